// The token tiles of a problem, as a kernel over experts takes them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/integers.hpp"
#include "cuda/arch/sm80/expert_tiles.cuh"
#include "cuda/problem.hpp"

namespace marlinq::cuda::sm80 {

inline SlotPlaces slot_places(const ExpertProblem& problem) {
  return {.top_k = Divider(problem.top_k),
          .weights_stride = problem.weights_stride,
          .x_by_slot = problem.x_by_slot,
          .y_by_slot = problem.y_by_slot};
}

inline ListedTiles listed_tiles(const ExpertProblem& problem, std::int32_t tokens) {
  const TokenTileLists& tiles = problem.tiles;
  return {.lists = tiles,
          .tile_rows = Divider(tiles.tile_rows),
          .pieces = Divider(static_cast<std::int32_t>(ceil_div(tiles.tile_rows, tokens))),
          .slots = slot_places(problem)};
}

inline SortedTiles sorted_tiles(const ExpertProblem& problem) {
  return {.topk = problem.tiles.topk,
          .num_experts = problem.num_experts,
          .slots = slot_places(problem)};
}

inline DispatchedTiles dispatched_tiles(const ExpertProblem& problem, std::int32_t tokens) {
  DispatchedTiles result;
  result.num_dispatches = static_cast<int>(problem.dispatches.size());
  result.x_by_slot = problem.x_by_slot;
  result.tiles = 0;
  for (std::size_t i = 0; i < problem.dispatches.size(); ++i) {
    result.rows[i] = problem.dispatches[i];
    result.first_tile[i] = result.tiles;
    result.tiles += static_cast<int>(ceil_div(problem.dispatches[i].rows, tokens));
  }
  return result;
}

}  // namespace marlinq::cuda::sm80

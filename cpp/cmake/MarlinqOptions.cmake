# Warnings, sanitizers and visibility, put on each of our targets and never on a consumer's.

function(marlinq_target_options target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  set_target_properties(${target} PROPERTIES
    CXX_EXTENSIONS OFF
    POSITION_INDEPENDENT_CODE ON
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON)
  # Contraction would round differently from place to place; fused products are written out where
  # they are meant.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -ffp-contract=off>)
  # Whatever is linked in statically (a CUDA runtime, a C++ library) stays inside.
  target_link_options(${target} PRIVATE $<$<PLATFORM_ID:Linux>:-Wl,--exclude-libs,ALL>)
  if(MARLINQ_WERROR)
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:-Werror>
      $<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings>)
  endif()
  if(MARLINQ_SANITIZE)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:
      -fsanitize=${MARLINQ_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer>)
    target_link_options(${target} PUBLIC -fsanitize=${MARLINQ_SANITIZE})
  endif()
endfunction()

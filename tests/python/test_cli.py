"""The command `marlinq`: what it prints, and its exit codes."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import marlinq
import numpy as np
import pytest
from gptq_writer import Tensor, make_layer, pack_zeros, with_zeros, write_checkpoint
from marlinq.cli import bench, main
from support import DATA, run_python

MINILM = str(DATA / "minilm-w4-g128-sym")
MOE = str(DATA / "qwen3moe-w4-g128-sym")
LAYER = make_layer(64, 256, symmetric=False)


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> Any:
        """The one JSON document of stdout."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> Result:
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def write_mixed(directory: Path) -> str:
    """A sound module, and one that cannot be loaded."""
    broken = dict(LAYER.tensors())
    broken["g_idx"] = Tensor("I32", np.full(256, 99, np.int32))
    return str(write_checkpoint(directory, {"sound": LAYER, "broken": broken}))


def test_info(run: Any) -> None:
    result = run("info")
    assert (result.code, result.err) == (0, "")
    assert marlinq.__version__ in result.out
    assert f"built {marlinq.info()['build']}" in result.out
    for backend in marlinq.info()["backends"]:
        assert f"backend {backend['name']}" in result.out
        for kernel in backend["kernels"]:
            assert kernel["name"] in result.out
    assert run("info", "--json").document == json.loads(json.dumps(marlinq.info()))


def test_inspect(run: Any) -> None:
    result = run("inspect", MINILM)
    assert (result.code, result.err) == (0, "")
    for info in marlinq.open(MINILM).modules():
        (line,) = [line for line in result.out.splitlines() if line.startswith(info.name)]
        assert re.search(rf"4 +128 +sym v1 .*{info.k} x {info.n}", line)
    assert "18 quantised modules, 2.8 MB, 0 unsupported" in result.out


def test_inspect_json(run: Any) -> None:
    document = run("inspect", MINILM, "--json").document
    assert document["modules"] == [info.as_dict() for info in marlinq.open(MINILM).modules()]
    assert document["summary"]["modules"] == document["summary"]["supported"] == 18
    assert document["summary"]["bits"] == 4
    assert document["checkpoint"] == MINILM


def test_inspect_joins_experts(run: Any) -> None:
    result = run("inspect", MOE)
    assert "experts.{0-7}.gate_proj" in result.out
    assert result.out.count("gate_proj") == 1
    assert run("inspect", MOE, "--all").out.count("gate_proj") == 8


def test_inspect_tells_why_a_module_is_not_supported(run: Any, tmp_path: Path) -> None:
    checkpoint = write_mixed(tmp_path)
    result = run("inspect", checkpoint)
    assert (result.code, result.err) == (0, "")
    (line,) = [line for line in result.out.splitlines() if line.startswith("broken")]
    assert "broken.g_idx: element [0] is 99, expected -2 to 1" in line
    document = run("inspect", checkpoint, "--json").document
    assert document["summary"]["unsupported"] == 1
    assert "g_idx" in document["modules"][0]["reason"]


def test_inspect_of_another_method(run: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"proj": LAYER}, quantize_config={"quant_method": "awq"})
    result = run("inspect", str(tmp_path))
    assert result.code == 0
    assert "unsupported: proj: quant_method awq, expected gptq" in result.out


def test_inspect_without_quantised_modules(run: Any, tmp_path: Path) -> None:
    others = {"a.weight": Tensor("F32", np.zeros((2, 2), np.float32))}
    write_checkpoint(tmp_path, {}, others=others)
    result = run("inspect", str(tmp_path))
    assert (result.code, result.err) == (0, "")
    assert "0 quantised modules" in result.out
    assert run("inspect", str(tmp_path), "--json").document["modules"] == []


def test_select_modules(run: Any) -> None:
    document = run("inspect", MINILM, "--json", "--modules", "*.layer.1.*").document
    assert len(document["modules"]) == 6
    result = run("inspect", MINILM, "--modules", "nothing*")
    assert result.code == 2
    assert result.err == "marlinq: --modules nothing*: matches none of 18 modules\n"


def test_overrides_reach_open(run: Any, tmp_path: Path) -> None:
    directory = str(write_checkpoint(tmp_path, {"proj": LAYER}, layout="gptq_v2"))
    arguments = ("--bits", "4", "--group-size", "128", "--checkpoint-format", "gptq_v2")
    (module,) = run("inspect", directory, *arguments, "--json").document["modules"]
    assert (module["zero_points"], module["checkpoint_format"]) == ("v2", "gptq_v2")
    result = run("inspect", directory, "--checkpoint-format", "awq")
    assert result.code == 2
    assert "checkpoint_format: 'awq', expected one of" in result.err


def test_verify(run: Any) -> None:
    result = run("verify", MINILM)
    assert (result.code, result.err) == (0, "")
    assert "18 of 18 modules ok, 0 failed" in result.out
    assert "FAIL" not in result.out


def test_verify_json(run: Any) -> None:
    result = run("verify", MOE, "--json", "--rows", "1,2", "--compute", "float32", "--threads", "2")
    document = result.document
    assert (result.code, result.err) == (0, "")
    assert (document["passed"], document["failed"]) == (24, 0)
    for module in document["modules"]:
        assert module["ok"]
        assert [row["m"] for row in module["rows"]] == [1, 2]
        for row in module["rows"]:
            assert 0 < row["error"] <= row["bound"]


def test_verify_with_a_kernel(run: Any, kernel: str) -> None:
    arguments = ("--kernel", kernel, "--modules", "*.layer.0.*", "--json")
    document = run("verify", MINILM, *arguments).document
    assert {module["kernel"] for module in document["modules"]} == {kernel}


def test_verify_fails_where_a_module_cannot_be_loaded(run: Any, tmp_path: Path) -> None:
    checkpoint = write_mixed(tmp_path)
    result = run("verify", checkpoint)
    assert (result.code, result.err) == (1, "")
    assert "1 of 2 modules ok, 1 failed" in result.out
    assert re.search(r"broken +.*FAIL .*g_idx: element \[0\] is 99", result.out)
    document = run("verify", checkpoint, "--json").document
    assert [(module["name"], module["ok"]) for module in document["modules"]] == [
        ("broken", False),
        ("sound", True),
    ]
    assert "g_idx" in document["modules"][0]["reason"]


def test_verify_fails_where_the_numbers_are_wrong(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlinq.reference import Weight

    right = Weight.product

    def wrong(self: Weight, x: Any) -> Any:
        product = right(self, x)
        product.y[:, 0] += 1
        return product

    monkeypatch.setattr(Weight, "product", wrong)
    result = run("verify", MINILM, "--modules", "*.layer.0.output.dense")
    assert result.code == 1
    assert "FAIL" in result.out
    assert "0 of 1 modules ok, 1 failed" in result.out


def test_verify_of_nothing_is_no_success(run: Any, tmp_path: Path) -> None:
    others = {"a.weight": Tensor("F32", np.zeros((2, 2), np.float32))}
    write_checkpoint(tmp_path, {}, others=others)
    result = run("verify", str(tmp_path))
    assert result.code == 2
    assert result.err == f"marlinq: {tmp_path}: holds no quantised module\n"


def test_warnings_do_not_disturb(run: Any, tmp_path: Path) -> None:
    zeros = LAYER.zeros.copy()
    zeros[0, 3] = 0
    tensors = dict(with_zeros(LAYER, zeros).tensors())
    tensors["qzeros"] = Tensor("I32", pack_zeros(zeros, 4, "gptq_old"))
    directory = str(write_checkpoint(tmp_path, {"proj": tensors}))
    (module,) = run("inspect", directory, "--json").document["modules"]
    assert len(module["warnings"]) == 1
    result = run("verify", directory, "--json")
    assert (result.code, result.err) == (0, "")


BENCH = ("--rows", "1,3", "--seconds", "0.001", "--hot", "--threads", "1")


def test_bench(run: Any) -> None:
    result = run("bench", "--shapes", "64x256,32x128", *BENCH)
    assert (result.code, result.err) == (0, "")
    for column in ("N x K", "time", "GB/s", "GFLOP/s", "numpy"):
        assert column in result.out
    assert len(re.findall(r"64 x 256 ", result.out)) == 2


def test_bench_json(run: Any) -> None:
    result = run(
        "bench", "--shapes", "64x256", "--json", "--bits", "8", "--group-size", "32", *BENCH
    )
    assert (result.code, result.err) == (0, "")
    rows = result.document["results"]
    assert [(row["n"], row["k"], row["m"], row["bits"]) for row in rows] == [
        (64, 256, 1, 8),
        (64, 256, 3, 8),
    ]
    assert {row["device"] for row in rows} == {result.document["device"]} == {"cpu"}
    for row in rows:
        for name in ("seconds", "gb_per_second", "gflop_per_second", "numpy_seconds"):
            assert row[name] > 0
    result = run("bench", "--shapes", "64x256", "--json", "--no-numpy", *BENCH)
    assert {row["numpy_seconds"] for row in result.document["results"]} == {None}


def test_bench_of_a_checkpoint(run: Any) -> None:
    result = run("bench", MOE, "--modules", "*.experts.*.down_proj", "--json", *BENCH)
    assert (result.code, result.err) == (0, "")
    shapes = {(row["n"], row["k"], row["count"]) for row in result.document["results"]}
    assert shapes == {(256, 128, 8)}


def test_bench_of_a_block(run: Any) -> None:
    result = run("bench", "--moe", "4,2,64,32", "6,1,32,64", "--json", *BENCH)
    assert (result.code, result.err) == (0, "")
    rows = result.document["results"]
    assert [(row["experts"], row["top_k"], row["k"], row["n"], row["m"]) for row in rows] == [
        (experts, top_k, hidden, inner, m)
        for experts, top_k, hidden, inner in ((4, 2, 64, 32), (6, 1, 32, 64))
        for m in (1, 3)
    ]
    for row in rows:
        assert row["name"] == f"moe {row['experts']} experts, top {row['top_k']}"
        assert row["memory_share"] is None
        for name in ("seconds", "gb_per_second", "gflop_per_second", "packed_bytes"):
            assert row[name] > 0
    # One token meets two experts of four, three tokens at most all of them.
    assert rows[0]["packed_bytes"] < rows[1]["packed_bytes"] <= 2 * rows[0]["packed_bytes"]
    assert result.document["memory_gb_per_second"] is None


def test_bench_beside_memory(run: Any) -> None:
    cold = [option for option in BENCH if option != "--hot"]
    options = ("--shapes", "1024x1024", "--moe", "8,2,256,256", "--no-numpy", *cold)
    result = run("bench", *options, "--json")
    assert (result.code, result.err) == (0, "")
    memory = result.document["memory_gb_per_second"]
    assert memory > 0
    names = {row["name"] for row in result.document["results"]}
    assert names == {"1024x1024", "moe 8 experts, top 2"}
    for row in result.document["results"]:
        assert row["memory_share"] == pytest.approx(row["gb_per_second"] / memory)
        assert row["copies"] > 1
    table = run("bench", *options).out
    assert "of memory" in table
    assert "of peak" in table


@pytest.mark.parametrize("compute", ["float32", "int16"])
def test_bench_beside_the_peak(compute: str, run: Any) -> None:
    options = ("--shapes", "64x256", "--moe", "4,2,64,32", "--compute", compute)
    result = run("bench", *options, "--json", *BENCH)
    assert (result.code, result.err) == (0, "")
    peak = result.document["peak_gflop_per_second"]
    assert peak > 0
    for row in result.document["results"]:
        assert row["peak_share"] == pytest.approx(row["gflop_per_second"] / peak)


def test_bench_knows_models(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """By default all of them; their weights are too large for a test."""
    measured: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        bench,
        "_bench_moe",
        lambda name, shape, *_: measured.append((name, *vars(shape).values())) or [],
    )
    wanted = [
        ("qwen3-30b-a3b", 128, 8, 2048, 768),
        ("mixtral-8x7b", 8, 2, 4096, 14336),
        ("deepseek-v3", 256, 8, 7168, 2048),
    ]
    assert run("bench", "--moe", *BENCH).code == 0
    assert measured == wanted
    measured.clear()
    assert run("bench", "--moe", "mixtral-8x7b", *BENCH).code == 0
    assert measured == wanted[1:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", MINILM, "--shapes", "64x64"), "--shapes and --moe are for random weights"),
        (("bench", "--shapes", "64"), "'64', expected NxK"),
        (("bench", "--shapes", "64x0"), "'0', expected an integer of at least 1"),
        (("bench", "--moe", "4,2"), "'4,2', expected four numbers"),
        (("bench", "--moe", "qwen"), "or one of qwen3-30b-a3b, mixtral-8x7b, deepseek-v3"),
        (("bench", "--rows", "0"), "'0', expected an integer of at least 1"),
        (("bench", "--shapes", "64x64", "--kernel", "fast"), "fast"),
        (("verify", MINILM, "--kernel", "fast"), "--kernel fast: expected one of"),
        (("verify", MINILM, "--compute", "half"), "--compute half: expected one of auto, float32"),
        (("bench", "--moe", "4,5,64,32"), "--moe: top_k 5 of 4 experts"),
        (("verify", MINILM, "--rows", "x"), "'x', expected an integer of at least 1"),
        (("verify", MINILM, "--device", "tpu"), "device: 'tpu', expected 'cpu'"),
        (("bench", "--device", "tpu"), "device: 'tpu', expected 'cpu'"),
        (("inspect", MINILM, "--device", "tpu"), "device: 'tpu', expected 'cpu'"),
        (("tune", "--device", "cpu"), "tune: expected a checkpoint or --shapes, and not both"),
        (("tune", MINILM, "--shapes", "8x8", "--device", "cpu"), "tune: expected a checkpoint or"),
        (("tune", "--shapes", "8"), "'8', expected NxK"),
        (("tune", "--shapes", "64x64", "--device", "cpu"), "backend 'cpu' does not support tune"),
        (
            ("tune", "--shapes", "8x8", "--device", "cpu", "--output", "missing/schedules.txt"),
            "missing/schedules.txt: No such file",
        ),
        (("bench", "--shapes", "64x64", "--schedules", "missing.txt"), "missing.txt: No such file"),
        (("verify",), "CHECKPOINT"),
        (("nonsense",), "nonsense"),
        ((), "COMMAND"),
    ],
)
def test_wrong_usage(run: Any, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert message in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", ["inspect", "verify", "bench"])
@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_unreadable_checkpoints(
    run: Any, tmp_path: Path, command: str, extra: tuple[str, ...]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    (tmp_path / "empty").mkdir()
    for path in ("model.safetensors", "empty", "missing"):
        result = run(command, str(tmp_path / path), *extra)
        assert (result.code, result.out) == (2, "")
        (line,) = result.err.splitlines()
        assert line.startswith("marlinq: ")
        assert str(tmp_path / path) in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("info", "-h"),
        ("inspect", "-h"),
        ("verify", "-h"),
        ("bench", "-h"),
        ("tune", "-h"),
    ],
)
def test_help_has_examples(run: Any, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.code, result.err) == (0, "")
    assert re.search(r"examples:\n  marlinq \w+", result.out)
    assert max(map(len, result.out.splitlines())) <= 100


def test_bench_of_a_checkpoint_that_cannot_be_loaded(run: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"proj": LAYER}, quantize_config={"quant_method": "awq"})
    result = run("bench", str(tmp_path), *BENCH)
    assert result.code == 2
    assert result.err == f"marlinq: {tmp_path}: no module that marlinq can load\n"


def test_interrupted(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(marlinq.Checkpoint, "modules", interrupt)
    result = run("inspect", MINILM)
    assert (result.code, result.out) == (130, "")
    assert "Traceback" not in result.err


def test_version(run: Any) -> None:
    assert run("--version").out == f"marlinq {marlinq.__version__}\n"


def marlinq_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        run_python("-m", "marlinq", *arguments), capture_output=True, text=True, check=False
    )


def test_as_a_process() -> None:
    result = marlinq_process("inspect", MINILM, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["summary"]["modules"] == 18
    result = marlinq_process("--cmake-dir")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{marlinq.get_cmake_dir()}\n"
    result = marlinq_process("verify", "/nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "marlinq: /nowhere: No such file or directory\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    process = subprocess.Popen(
        run_python("-m", "marlinq", "inspect", MOE, "--all"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert errors == b""

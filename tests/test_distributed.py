"""A training shared by several processes is the run of one: its losses, its weights, its files.

As a script this file is those processes: `python tests/test_distributed.py FOLDER ACTION ...`. They
are forked from one that has imported everything, and use gloo.
"""
import os
import random
import shutil
import signal
import sys
import time
import weakref
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common.distributed as ranks
from common.cache import ResultCache
from common.cli import run_command
from common.errors import UserError
from data.tokenizer import open_tokenizer
from eval import measure_lengths, perplexity
from evaluation.jobs import parallel_map
from finetune import FinetuneConfig
from forks import (be_the_script, begin_script, exit_status, finish_script, forked,
                   free_port)
from methods import RopeConfig, training_positions
from methods.lora import LoRA, add_lora, lora_of_flags
from model import LLaMA, ModelConfig
from toy_training import read_metrics, settings
from train import TrainConfig, fit
from train import new_model as new_model_of_training
from training import extension
from training.extension import load_extended, load_saved
from training.run import check_ranks
from training.state import save_weights, saved_states
from weights import load_model
from weights.export import export
from weights.save import save_model

pytestmark = pytest.mark.slow
V, T, L, ROWS = 13, 16, 8, 8
TINY = Path(__file__).parent.parent / "data" / "tiny"
ACTIONS = {}


def action(function):
    ACTIONS[function.__name__] = function
    return function


def begin(folder):
    """conftest.py calls it before the first test of all: the actions take a minute."""
    return begin_script(__file__, folder, ACTIONS)


@pytest.fixture(scope="module")
def finish(begun):
    """finish(action): the folder in which it worked, and what it printed. All of them run side by
    side."""
    process, folder = begun
    printed = finish_script(process, folder)
    return lambda name: (folder / name, printed(name))


# ---- The processes -------------------------------------------------------------------------------


def start(world, work):
    """Call work(rank) in `world` processes of one group; returns their pids."""
    port = free_port()

    def one(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.join_process_group()
        work(rank)
    return [forked(lambda rank=rank: one(rank)) for rank in range(world)]


def together(world, work):
    """The same, and wait for all."""
    statuses = [exit_status(pid) for pid in start(world, work)]
    assert statuses == [0] * world, statuses


def rows_of(case):
    """The rows of a step, as data.batches.Batches gives them."""
    rope = {"original_max_position_embeddings": L} | case.get("rope", {})
    skips = case.get("pose")

    def batches(step, first=0, last=ROWS):
        tokens = []
        for row in range(first, last):
            start, stride = step * 5 + row * 3, 1 + (step + row) % 4
            tokens.append([(start + stride * t) % V for t in range(T + 1)])
        tokens = torch.tensor(tokens)
        targets = tokens[:, 1:].clone()
        if case.get("unscored"):  # another number of targets in every row
            for row in range(first, last):
                targets[row - first, :row] = -100
        if not skips:
            return tokens[:, :-1], targets
        draw = training_positions(RopeConfig.from_dict(rope), L, 4 * T, "pose")
        positions = [draw(np.random.default_rng((step, 1)), np.random.default_rng((step, row)), T)
                     for row in range(first, last)]
        return tokens[:, :-1], targets, torch.from_numpy(np.stack(positions))
    return batches


def new_model(case):
    torch.manual_seed(0)
    rope = {"original_max_position_embeddings": L} | case.get("rope", {"rope_type": "default"})
    return LLaMA(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=V,
                             max_seq_len=T, rope=RopeConfig.from_dict(rope),
                             tied=case.get("tied", False)))


def train(out, case, batches=None, world=1, **changes):
    """Twenty steps of eight rows of sixteen tokens, whatever the number of processes."""
    model = new_model(case)
    if "lora" in case:
        model.path = str(out.parent.parent / "tied")  # of the base
        add_lora(model, case["lora"])
    micro_batches = case.get("settings", {}).get("accumulate", 1)
    C = changes.get("context_parallel", 1)
    config = settings(out, **{"batch_size": ROWS * C // world // micro_batches, "lr": 0.01,
                              "save_every": 20, **case.get("settings", {}), **changes})
    fit(model, config, batches or rows_of(case), validation if case.get("validated") else None,
        progress=False)


@torch.no_grad()
def validation(model):
    return {"val_loss": model.loss(*rows_of({})(1000)).item()}


REROPE = {"rope_type": "rerope", "factor": 2.0, "temperature": "log_n"}
ROPES = {"linear": {"rope_type": "linear", "factor": 2.0}, "dynamic": {"rope_type": "dynamic"},
         "yarn": {"rope_type": "yarn", "factor": 2.0}, "alibi": {"rope_type": "alibi"},
         "rerope": REROPE}
MODES = {"sdpa": {"attention": "sdpa"}, "tiled": {"attention": "tiled"},
         "recompute": {"recompute": True}}
# Each method and each mode; all their products were tried once, and take minutes.
MAIN_CASES = {f"{rope}-{mode}": {"rope": ROPES[rope], "settings": MODES[mode]}
              for rope, mode in zip(ROPES, ["sdpa", "tiled", "recompute", "sdpa", "tiled"])}
CASES = MAIN_CASES | {
    "tied-accumulate": {"tied": True, "settings": {"accumulate": 2, "eval_every": 7},
                        "validated": True},
    "bfloat16": {"settings": {"dtype": "bfloat16", "eval_every": 7}, "validated": True,
                 "tolerance": 0.03},
    "lora-bfloat16": {"lora": LoRA(rank=4), "tied": True, "tolerance": 0.03,
                      "settings": {"dtype": "bfloat16", "eval_every": 7}, "validated": True},
    "unscored": {"unscored": True},
    "pose": {"rope": ROPES["yarn"], "pose": True},
    "clex": {"rope": {"rope_type": "clex"}},
    "no-rope-layers": {"rope": {"rope_type": "default", "no_rope_layer_interval": 2}},
    "lora": {"lora": LoRA(rank=4, base_dtype="float32"), "tied": True, "validated": True,
             "settings": {"eval_every": 10, "save_every": 10}},
    "naive": {"rope": REROPE, "settings": {"attention": "naive"}},
}
SPLITS = [(4, 1), (4, 2), (4, 4), (2, 1), (2, 2)]  # processes, and how many share a row
RUNS = [(name, *split) for name in CASES for split in SPLITS if name in MAIN_CASES or split[0] == 2]


# ---- The same run --------------------------------------------------------------------------------


def all_cases(folder, world):
    def work(rank):
        for name, processes, C in RUNS:
            if processes == world:
                train(folder / f"{name}-{C}", CASES[name], world=world, context_parallel=C)
    together(world, work)


@action
def four(folder):
    all_cases(folder, 4)


@action
def two(folder):
    all_cases(folder, 2)


@action
def one(folder):
    for name, case in CASES.items():
        train(folder / name, case)


@pytest.mark.parametrize("name, world, C", RUNS)
def test_every_split_is_one_run(finish, name, world, C):
    alone, _ = finish("one")
    shared, _ = finish({4: "four", 2: "two"}[world])
    alone, shared = alone / name, shared / f"{name}-{C}"
    expected, found = read_metrics(alone), read_metrics(shared)
    assert [line["step"] for line in found if "loss" in line] == list(range(1, 21))
    tolerance = CASES[name].get("tolerance")  # of bfloat16; its weights are not compared
    for there, here in zip(expected, found, strict=True):
        for number in {"loss", "val_loss"} & there.keys():
            assert here[number] == pytest.approx(there[number], abs=tolerance or 1e-5)
        if "loss" in there and not tolerance:
            assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
    if tolerance:
        return
    if "lora" in CASES[name]:
        pytest.importorskip("safetensors")      # an extra: it reads adapters
    weights = dict(load_model(alone).named_parameters())
    for n, p in load_model(shared).named_parameters():
        assert torch.linalg.vector_norm(p - weights[n]) <= 1e-4 * torch.linalg.vector_norm(p), n


@action
def offload(folder):
    """Weights, gradients and moments that wait in the computer's memory: the same run, by one
    process without torchrun, which stops halfway, and by two."""
    case = MAIN_CASES["linear-sdpa"]

    def alone():
        train(folder / "tied-accumulate", CASES["tied-accumulate"], offload=True)
        train(folder / "1", case, offload=True, steps=10, schedule="constant")
        train(folder / "1", case, offload=True, schedule="constant")
        train(folder / "as-it-was", case, schedule="constant")
        train(folder / "lora", CASES["lora"], offload=True)
    assert exit_status(forked(alone)) == 0
    together(2, lambda rank: train(folder / "2", case, world=2, context_parallel=2, offload=True))

    def loaded():
        config = FinetuneConfig(offload=True, dtype="float32")
        device = torch.device("cpu:0")      # where it computes; what waits is on "cpu"
        before = []
        for training in (config, None):
            model = load_extended(str(folder / "2"), ROPES["linear"], L, T, device, "auto",
                                  training, offload=True)
            assert all(model() is None for model in before), "one at a time is in memory"
            assert model.device == device and ranks.is_sharded(model)
            assert_equal_weights(model, load_model(folder / "2"))
            assert {p.device for p in model.parameters()} == {torch.device("cpu")}
            if not training:        # in inference mode, by several threads if it could
                texts, plain = [np.arange(n) % V for n in range(4, T)], load_model(folder / "2")
                torch.set_num_threads(4)
                here, there = (perplexity(m, texts, T, progress=False) for m in (model, plain))
                torch.set_num_threads(1)
                assert here["nll"] == pytest.approx(there["nll"], abs=1e-6)
            work = "loss" if training else "hidden"      # what FSDP gathers the weights for
            batch = rows_of({})(0)[:1 + bool(training)]
            with torch.no_grad():
                here, there = (getattr(m, work)(*batch) for m in (model, load_model(folder / "2")))
            assert torch.allclose(here, there, atol=1e-5)
            before.append(weakref.ref(model))
            model = None
        with pytest.raises(UserError, match="go on without torchrun and --offload"):
            train(folder / "as-it-was", case, offload=True, schedule="constant")
    assert exit_status(forked(loaded)) == 0


@pytest.mark.parametrize("name, same_run", [
    ("1", "offload/as-it-was"), ("2", "one/linear-sdpa"), ("lora", "one/lora"),
    ("tied-accumulate", "one/tied-accumulate")])
def test_offloaded_it_is_the_same_run(finish, name, same_run):
    offloaded, _ = finish("offload")
    finish("one")
    here, there = offloaded / name, offloaded.parent / same_run
    for a, b in zip(read_metrics(here), read_metrics(there), strict=True):
        assert a["step"] == b["step"] and a.get("loss") == pytest.approx(b.get("loss"), abs=1e-5)
    if name == "lora":
        pytest.importorskip("safetensors")
    weights = dict(load_model(there).named_parameters())
    for n, p in load_model(here).named_parameters():
        assert torch.linalg.vector_norm(p - weights[n]) <= 1e-4 * torch.linalg.vector_norm(p), n
    assert saved_states(here), "a state of shards, whoever trained"


# ---- Checkpoints ---------------------------------------------------------------------------------


@action
def resume(folder):
    """Ten steps by four processes, and ten more by four, by two, and by one."""
    for kind in ({}, {"lora": LoRA(rank=4, base_dtype="float32"), "tied": True}):
        resume_case(folder, "lora" if kind else "full", kind)


def resume_case(folder, kind, case):
    case = case | {"settings": {"schedule": "constant", "save_every": 10}}
    split = {4: {"context_parallel": 2}, 2: {"context_parallel": 1}, 1: {}}
    together(4, lambda rank: train(folder / f"{kind}-whole", case, world=4, context_parallel=2))
    half = folder / f"{kind}-half"
    together(4, lambda rank: train(half, case, world=4, steps=10, context_parallel=2))
    for world, changes in split.items():
        out = folder / f"{kind}-{world}"
        shutil.copytree(half, out)
        if world == 1:
            train(out, case, steps=15)
            train(out, case)  # its own state counts now
            assert not saved_states(out)
        else:
            together(world, lambda rank, out=out, world=world, changes=changes: train(
                out, case, world=world, **changes))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resumed_bit_for_bit_or_by_another_number(finish, kind):
    if kind == "lora":
        pytest.importorskip("safetensors")
    folder, _ = finish("resume")
    folder = folder / f"{kind}-"
    whole = dict(load_model(f"{folder}whole").named_parameters())
    for world in (4, 2, 1):
        assert [line["step"] for line in read_metrics(f"{folder}{world}")] == list(range(1, 21))
        for name, p in load_model(f"{folder}{world}").named_parameters():
            if world == 4:
                assert torch.equal(p, whole[name])
            assert torch.allclose(p, whole[name], atol=1e-6), (world, name)
        for a, b in zip(read_metrics(f"{folder}whole"), read_metrics(f"{folder}{world}")):
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-6)
    assert list(saved_states(Path(f"{folder}4"))) == [2], "one state is kept, the newest"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_flipped_bit_in_a_sharded_state_is_noticed(finish, tmp_path):
    """Its checksums are in state.pt; one that has none is from before there were any."""
    folder, _ = finish("resume")
    case = {"settings": {"schedule": "constant", "save_every": 10}}
    shutil.copytree(folder / "full-4", tmp_path / "run")
    (state,) = saved_states(tmp_path / "run").values()
    shards = sorted(state.glob("*.distcp"))
    assert len(shards) == 4
    data = bytearray(shards[2].read_bytes())
    at = data.find(b"data/0") + 200         # among the values of its first tensor
    data[at] ^= 1
    shards[2].write_bytes(data)
    with pytest.raises(UserError, match="the state of this run cannot be read .ValueError"):
        train(tmp_path / "run", case, steps=20)
    content = torch.load(state / "state.pt", weights_only=True)
    del content["checksums"]
    torch.save(content, state / "state.pt")
    train(tmp_path / "run", case, steps=20)


@action
def stop(folder):
    """Rank 1 alone gets Ctrl-C: all stop after the same step, with all steps saved."""
    def work(rank):
        def batches(step, *share):
            if rank == 1 and step == 7:
                os.kill(os.getpid(), signal.SIGINT)
            return rows_of({})(step, *share)
        try:
            train(folder, {}, batches, world=2, log_every=20)
        except KeyboardInterrupt as stopped:
            print(rank, stopped, flush=True)
    together(2, work)


def test_ctrl_c_in_one_process_stops_all(finish):
    folder, printed = finish("stop")
    (state,) = saved_states(folder).values()
    step = torch.load(state / "state.pt", weights_only=True)["step"]
    assert 7 <= step <= 9, "soon, at a step that is not logged"
    assert printed.count(f"stopped at step {step} of 20 and saved") == 2


def status_within(seconds, pid):
    """exit_status of a process that has to end by itself in this time."""
    for _ in range(100 * seconds):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the survivor hangs")


@action
def kills(folder):
    """Twenty SIGKILLs at random moments, of one process or of all. What remains ends with a line,
    and the same command goes on."""
    chance = random.Random(0)
    changes = dict(steps=60, save_every=5)
    together(2, lambda rank: train(folder / "whole", {}, world=2, **changes))
    whole, killed = dict(load_model(folder / "whole").named_parameters()), 0

    def part(rank):
        (folder / f"joined{rank}").touch()
        try:
            run_command(lambda: train(out, {}, world=2, **changes))
        except SystemExit as end:
            os._exit(end.code)
    for n in range(100):
        out, statuses = folder / f"killed{n}", []
        while statuses != [0, 0]:
            joined = [folder / f"joined{rank}" for rank in range(2)]
            for marker in joined:
                marker.unlink(missing_ok=True)
            pids = start(2, part)
            while not all(marker.exists() for marker in joined):  # before that, torchrun ends both
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.7))
            killing = killed < 20
            if killing:
                for pid in pids if chance.random() < 0.3 else [chance.choice(pids)]:
                    os.kill(pid, signal.SIGKILL)
            # A survivor ends soon. A training that nobody kills may be slow beside other tests.
            statuses = [status_within(60, pid) if killing else exit_status(pid) for pid in pids]
            assert set(statuses) <= {0, 2, -signal.SIGKILL}, statuses
            killed += -signal.SIGKILL in statuses
            if (out / "consolidated.00.pth").exists():
                load_model(out)
        for name, p in load_model(out).named_parameters():
            assert torch.equal(p, whole[name]), name
        assert [line["step"] for line in read_metrics(out)] == list(range(1, 61)), "each once"
        left = [file.name for file in out.iterdir() if file.name.startswith(".")]
        assert not left, f"{left}: leftovers of killed saves"
        if killed == 20:
            break
    print(f"{killed} kills")


def test_twenty_kills(finish):
    _, printed = finish("kills")
    assert "20 kills" in printed
    survivors = printed.count("error: another process ended")
    assert survivors > 5 and "Traceback" not in printed


@action
def load(folder):
    """Sharded weights are those of load_model, from every layout."""
    torch.manual_seed(0)
    model = LLaMA(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=14))
    save_model(model, folder / "meta")
    export(folder / "meta", "hf", folder / "hf")
    export(folder / "meta", "gguf", folder / "model.gguf")
    write_meta_parts(model, folder / "parts")

    def shard(model):
        ranks.shard_weights(model, torch.device("cpu"), torch.float32)

    def work(rank):
        for name in ("meta", "hf", "model.gguf", "parts"):
            sharded = load_model(folder / name, shard=shard)
            assert ranks.is_sharded(sharded)
            held = sum(ranks.own_rows(p).numel() for p in sharded.parameters())
            assert held < 0.5 * sum(p.numel() for p in sharded.parameters())
            for n, p in load_model(folder / name).named_parameters():
                assert torch.equal(ranks.whole(sharded.get_parameter(n)), p), (name, n)
        clex = {"rope_type": "clex"}  # a network that the file has not
        sharded = load_model(folder / "meta", clex, shard=shard)
        assert_equal_weights(sharded, load_model(folder / "meta", clex))
    together(3, work)


def assert_equal_weights(sharded, model):
    assert ranks.is_sharded(sharded)
    assert [n for n, _ in sharded.named_parameters()] == [n for n, _ in model.named_parameters()]
    for n, p in model.named_parameters():
        assert torch.equal(ranks.whole(sharded.get_parameter(n)), p), n
        assert sharded.get_parameter(n).dtype == p.dtype
        assert sharded.get_parameter(n).requires_grad == p.requires_grad


@action
def load_lora(folder):
    """LoRA's matrices, and an adapter merged into its base, are those of one process."""
    base, device = folder.parent / "tied", torch.device("cpu")
    config = FinetuneConfig(lora_rank=4, lora_matrices=["wq", "w2"], seed=3, dtype="float32")
    rope = {"rope_type": "linear", "factor": 2.0}
    adapted = load_model(base, dtype=None)
    add_lora(adapted, lora_of_flags(config), seed=3)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if name.endswith("lora_b"):
                p.normal_()
    save_weights(adapted, folder / "adapter", None)

    def work(rank):
        sharded = load_extended(str(base), rope, L, 2 * L, device, "auto", config)
        alone = load_model(base, dtype=None)
        add_lora(alone, lora_of_flags(config), seed=3)
        assert_equal_weights(sharded, alone)
        merged = load_model(folder / "adapter", shard=lambda model: ranks.shard_weights(
            model, device, torch.float32))
        assert_equal_weights(merged, load_model(folder / "adapter"))
    together(3, work)


def test_lora_is_sharded_as_it_is_read(finish):
    pytest.importorskip("safetensors")
    finish("load_lora")


@action
def draw(folder):
    """A training from scratch begins with the weights of one process."""
    shape = new_model({"rope": {"rope_type": "clex"}}).config

    def work(rank):
        model = new_model_of_training(shape, TrainConfig(seed=5), torch.device("cpu"))
        torch.manual_seed(5)
        assert_equal_weights(model, LLaMA(shape))
    together(2, work)


def test_a_training_from_scratch_begins_as_one_process_would(finish):
    finish("draw")


def write_meta_parts(model, folder):
    """As two GPUs of Meta's training would have saved it (weights/meta.py)."""
    folder.mkdir()
    save_model(model, folder)
    whole = torch.load(folder / "consolidated.00.pth", weights_only=True)
    for n in range(2):
        part = {}
        for name, tensor in whole.items():
            columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
            cut = tensor.chunk(2, dim=1 if columns else 0)[n] if tensor.dim() > 1 else tensor
            part[name] = cut.clone()
        torch.save(part, folder / f"consolidated.{n:02d}.pth")


def test_sharded_weights_come_from_every_layout(finish):
    finish("load")


def test_the_file_of_a_sharded_run_is_a_whole_archive(finish):
    folder, _ = finish("two")
    with zipfile.ZipFile(folder / "linear-sdpa-1" / "consolidated.00.pth") as archive:
        assert archive.testzip() is None, "checksums"


# ---- Work shared otherwise -----------------------------------------------------------------------


@action
def measure(folder):
    """Jobs of an evaluation: each rank computes its share, all get all values, and what rank 0's
    cache holds is not computed again."""
    def work(rank):
        computed = []

        def square(x):
            computed.append(x)
            return x * x
        cache = ResultCache(folder / "out.json" if rank == 0 else "")
        jobs = {("job", x): (x,) for x in range(7)}
        if rank == 0:
            cache.get(("job", 3), lambda: 9)
        found = list(parallel_map(square, jobs, None, cache, 1))
        assert found == [x * x for x in range(7)]
        assert computed == ([0, 2, 5] if rank == 0 else [1, 4, 6]), computed
        if rank == 0:
            assert len(cache.values) == 7
    together(2, work)


def test_measurements_are_shared(finish):
    finish("measure")


@action
def measure_sharded(folder):
    """A model too large for one rank is measured by all together, with the same numbers."""
    tokenizer = open_tokenizer(TINY / "tokenizer.model")
    torch.manual_seed(0)
    for rope in ("linear", "dynamic"):      # by one pass, and by generation
        config = RopeConfig(rope, factor=2.0, original_max_position_embeddings=128)
        save_model(LLaMA(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=256,
                                     vocab_size=tokenizer.vocab_size, rope=config)), folder / rope)
    text = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 600)
    device = torch.device("cpu")

    def work(rank):
        for rope in ("linear", "dynamic"):
            found = []
            for memory in (2**40, 1):
                extension.memory_per_rank = lambda device, memory=memory: memory
                model = load_saved(folder / rope, device, "auto")
                assert ranks.is_sharded(model) == (memory == 1)
                cache = ResultCache(folder / f"{rope}-{memory}.json" if rank == 0 else "")
                found.append(measure_lengths(model, tokenizer, [text], [128, 256], 3, 1,
                                             cache=cache))
            assert found[0] == found[1]
    together(2, work)


def test_a_model_too_large_for_one_rank_is_measured_by_all_together(finish):
    finish("measure_sharded")


@action
def wrong(folder):
    """Each mistake is a line on every process."""
    def refused(rank, config, row, message):
        try:
            check_ranks(config, row)
        except UserError as error:
            assert message in str(error), error
            print(f"refused {rank}: {error}", flush=True)
            return
        raise AssertionError(f"not refused: {message}")

    def work(rank):
        config = settings(folder)
        for changes, row, message in (
                ({"context_parallel": 3}, 12, "has to divide the number of processes, 2"),
                ({"context_parallel": 0}, 12, "has to divide"),
                ({"context_parallel": 2}, 14, "cannot be cut into 4 equal chunks"),
                ({"context_parallel": 2}, 2, "cannot be cut into 4 equal chunks")):
            refused(rank, settings(folder, **changes), row, message)
        config = settings(folder, lr=0.1 if rank == 1 else 0.2)
        refused(rank, config, 12, "process 1 was started with lr 0.1, process 0 with 0.2")
    together(2, work)


def test_wrong_set_ups_are_a_line_on_every_process(finish):
    _, printed = finish("wrong")
    assert printed.count("refused 0:") == printed.count("refused 1:") == 5


def test_wrong_set_ups_of_one_process(tmp_path):
    with pytest.raises(UserError, match="--context-parallel 2: has to divide .* processes, 1"):
        check_ranks(settings(tmp_path, context_parallel=2), 12)


def test_more_processes_than_gpus_and_no_nccl(monkeypatch):
    torchruns = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
                 "MASTER_PORT": "1"}
    for name, value in torchruns.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    with pytest.raises(UserError, match="more processes than GPUs: .*--nproc-per-node 1"):
        ranks.join_process_group()
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="built without NCCL"):
        ranks.join_process_group()


# ---- Chunks of a text, without processes ---------------------------------------------------------


@pytest.mark.parametrize("C", [1, 2, 4])
def test_the_ranks_have_all_tokens_once_and_as_many_pairs(C):
    shards = [ranks.ContextShard(r, C, None) for r in range(C)]
    own = [shard.own(16) for shard in shards]
    assert torch.cat(own).sort().values.tolist() == list(range(16))
    pairs = {int((places + 1).sum()) for places in own}  # a query at place m sees m + 1 keys
    assert len(pairs) == 1, "every rank has the same work"


def prepare(folder):
    import torch.distributed.checkpoint.state_dict, torch.distributed.fsdp  # noqa: E401, F401
    train(folder / "first", {}, steps=1)
    save_model(new_model({"tied": True}), folder / "tied")
    for name in ACTIONS:
        (folder / name).mkdir()


if __name__ == "__main__":
    be_the_script(ACTIONS, prepare)

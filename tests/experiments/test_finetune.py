"""SFT, reward models and DPO from the command line: what they learn and leave, killed, on 8 devices, merged, refused."""

import concurrent.futures
import functools
import hashlib
import json
import math
import pathlib
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.shared import training
from jaxgpt import partition, tree
from jaxgpt.data.chat import Message
from jaxgpt.models import decoder
from jaxgpt.partition import MeshConfig
from jaxgpt.runs.load import LoadedModel, abstract_params, load_model, load_params, read_run, trainable
from tests.experiments.conftest import ADAPTED, PROMPT, command, files, finetuning, here, killed
from tests.experiments.test_pretrain import rows

MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")


def manifest(workdir) -> dict:
    return json.loads((pathlib.Path(workdir) / "manifest.json").read_text())


def digest(content: dict) -> str:
    content = {name: value for name, value in content.items() if name != "checkpoint"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def state(workdir) -> dict[str, np.ndarray]:
    """Every leaf of the last checkpoint by its path name, as it lies on disk."""
    path = (pathlib.Path(workdir) / "checkpoints/12/state").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        there = reader.metadata(path).item_metadata.tree
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), there)
        return tree.named_leaves(reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=whole)))


def one_device():
    return partition.make_mesh(MeshConfig(), devices=jax.devices()[:1])


def load(workdir) -> LoadedModel:
    return load_model(str(workdir), one_device())


@pytest.fixture(scope="module")
def resumed(runs, tmp_path_factory) -> dict[str, tuple[pathlib.Path, subprocess.CompletedProcess]]:
    """Every run again, killed on its way and restarted by the same command."""
    root = tmp_path_factory.mktemp("resumed")
    # Within an evaluation, between checkpoints, and after the last row but before its checkpoint.
    places = {"sft": ("samples.jsonl", 12), "lora": ("metrics.jsonl", 10), "reward": ("metrics.jsonl", 12)}

    def resume(name: str):
        flags = (f"--workdir={root / name}", *runs[name].arguments)
        dead = killed(*places.get(name, ("metrics.jsonl", 10)), runs[name].stage, *flags)
        assert dead.returncode == -9, dead.stderr
        assert not (root / name / "manifest.json").exists()
        return root / name, command(runs[name].stage, *flags)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(runs, pool.map(resume, runs), strict=True))


@pytest.mark.parametrize("name", ["sft", "lora", "reward", "dpo"])
def test_killed_and_restarted_equals_undisturbed_bit_for_bit(runs, resumed, name):
    workdir, done = resumed[name]
    undisturbed = runs[name].workdir
    assert done.returncode == 0, done.stderr
    assert re.search(r"training from step [48]\.", done.stdout)
    assert rows(workdir) == rows(undisturbed)
    before, after = state(undisturbed), state(workdir)
    assert before.keys() == after.keys()
    for leaf, value in before.items():
        np.testing.assert_array_equal(value, after[leaf], err_msg=leaf)
    for log in ("samples.jsonl", "report_card.json"):
        if (undisturbed / log).exists():
            assert (workdir / log).read_bytes() == (undisturbed / log).read_bytes()
    one, other = manifest(undisturbed), manifest(workdir)
    one["final_metrics"], other["final_metrics"] = rows(undisturbed)[-1], rows(workdir)[-1]
    assert one.pop("checkpoint").keys() == other.pop("checkpoint").keys()  # files of orbax, each with a time in it
    assert one | {"git_commit": ""} == other | {"git_commit": ""}


@pytest.mark.parametrize(("name", "parent"), [("sft", "finished"), ("lora", "sft"), ("reward", "lora"), ("dpo", "sft")])
def test_a_stage_learns_and_leaves_what_the_contract_says(finished, runs, capsys, name, parent):
    run = runs[name]
    assert "Finished at step 12" in run.done.stdout
    logged = rows(run.workdir)
    assert [row["step"] for row in logged] == [0, 2, 4, 6, 8, 10, 12]
    assert logged[-1]["eval/loss"] < logged[0]["eval/loss"] - 0.1
    if name in ("reward", "dpo"):
        assert {"reward/accuracy", "reward/margin"} < logged[-1].keys()
        assert logged[-1]["eval/accuracy"] > 0.8
        assert logged[-1]["eval/margin"] > logged[0]["eval/margin"] + 0.3
    if name == "dpo":  # the policy starts as the reference
        assert logged[0]["eval/margin"] == 0
        assert logged[0]["eval/loss"] == pytest.approx(math.log(2))
    source = finished[0] if parent == "finished" else runs[parent].workdir
    made = manifest(run.workdir)
    assert made["stage"] == run.stage
    assert made["parents"] == {"init_from": {"path": str(source), "digest": digest(manifest(source))}}
    template = (run.workdir / "chat_template.jinja").read_bytes()
    assert made["chat_template_digest"] == hashlib.sha256(template).hexdigest()
    assert made["tokenizer_digest"] == manifest(finished[0])["tokenizer_digest"]
    assert made["final_metrics"]["eval/loss"] == logged[-1]["eval/loss"]
    assert (run.workdir / "plots/loss.png").exists()
    here(run.stage, f"--workdir={run.workdir}", *run.arguments)
    assert "is finished: step 12, eval/loss" in capsys.readouterr().out


def test_the_same_command_on_a_finished_run_exits_0_and_changes_nothing(runs):
    before = files(runs["sft"].workdir)
    done = command("sft", f"--workdir={runs['sft'].workdir}", *runs["sft"].arguments)
    assert done.returncode == 0, done.stderr
    assert "is finished: step 12" in done.stdout
    assert files(runs["sft"].workdir) == before


def test_generate_continues_the_template_and_agrees_with_the_samples(runs):
    workdir = runs["sft"].workdir
    model = load(workdir)
    ids = list(model.template.encode_prompt(model.tokenizer, [Message("user", PROMPT)]))
    assert ids[1:] != list(model.tokenizer.encode(PROMPT))
    start = len(ids)
    forward = jax.jit(functools.partial(decoder.forward, model.config))
    while len(ids) < start + 6 and ids[-1] not in model.template.stop_ids(model.tokenizer):
        tokens = np.zeros((1, 48), np.int32)
        tokens[0, : len(ids)] = ids
        ids.append(int(forward(model.params, jnp.asarray(tokens))[0, len(ids) - 1].argmax()))
    expected = model.tokenizer.decode(ids[start:])
    done = command("generate", "--config=configs/generate.py:greedy", f"--config.init_from={workdir}",
                   f"--config.prompt={PROMPT}", "--config.max_new_tokens=6")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{PROMPT}\n-> {expected}\n" in done.stdout
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    ours = [sample for sample in samples if sample["prompt"] == PROMPT]
    assert [sample["step"] for sample in ours] == [0, 6, 12]
    assert ours[-1]["response"] == expected
    assert samples[-1]["reference"].endswith(".")  # of the held-out prompt


def assert_equal_to_rounding(workdir, other) -> None:
    ours, theirs = rows(workdir), rows(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["lora", "reward"])
def test_eight_devices_equal_one_to_rounding(runs, tmp_path, name):
    run = runs[name]
    here(run.stage, f"--workdir={tmp_path}", *run.arguments, *MESH)
    assert_equal_to_rounding(tmp_path, run.workdir)


def test_precomputed_references_on_eight_devices_equal_a_kept_reference_on_one(runs, tmp_path):
    here("dpo", f"--workdir={tmp_path}", *runs["dpo"].arguments, *MESH, "--config.precompute_reference=true")
    assert_equal_to_rounding(tmp_path, runs["dpo"].workdir)


def is_adapted(name: str) -> bool:
    return any(f"/{module}/" in name for module in ADAPTED)


def test_a_checkpoint_of_adapters_holds_them_and_their_moments_alone_and_names_its_base(runs):
    leaves = state(runs["lora"].workdir)
    arrays = [name for name, value in leaves.items() if value.ndim and name != "rng"]
    assert len(arrays) == 3 * 2 * len(ADAPTED)  # parameters and two moments of A and B
    assert all(is_adapted(name) and name.endswith(("/lora_a", "/lora_b")) for name in arrays)
    meta = json.loads((runs["lora"].workdir / "checkpoints/12/meta/metadata").read_text())
    made = manifest(runs["lora"].workdir)
    assert {name: value for name, value in meta["sources"].items() if name != "data.train"} == {
        "init_from": digest(manifest(runs["sft"].workdir)), "data.tokenizer": made["tokenizer_digest"],
        "chat_template": made["chat_template_digest"],
    }  # fmt: skip
    assert {name for name in state(runs["reward"].workdir) if name.startswith("params/head")} == {
        "params/head/kernel", "params/head/bias",
    }  # fmt: skip


def test_merged_adapters_change_their_kernels_alone_and_give_the_logits_of_the_unmerged_model(runs):
    workdir, base = runs["lora"].workdir, load(runs["sft"].workdir)
    merged, config = load(workdir), read_run(str(workdir)).config
    assert config.lora.rank == 4
    assert merged.config.lora.rank == 0
    before, after = tree.named_leaves(base.params), tree.named_leaves(merged.params)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert np.array_equal(value, after[name]) != (is_adapted(name) and name.endswith("/kernel")), name
    abstract = tree.split(abstract_params(config, one_device()), trainable(config))[0]
    unmerged = tree.merge(load_params(str(workdir), abstract), base.params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 16)))
    ours = decoder.forward(merged.config, merged.params, tokens)
    np.testing.assert_allclose(ours, decoder.forward(config, unmerged, tokens), rtol=0, atol=1e-4)
    assert np.abs(ours - decoder.forward(base.config, base.params, tokens)).max() > 0.1


def test_adapters_whose_base_has_changed_are_refused_with_both_digests(runs, tmp_path):
    base, workdir = tmp_path / "base", tmp_path / "run"
    shutil.copytree(runs["sft"].workdir, base)
    shutil.copytree(runs["lora"].workdir, workdir)
    (workdir / "config.json").write_text(
        (workdir / "config.json").read_text().replace(str(runs["sft"].workdir), str(base))
    )
    load(workdir)
    changed = manifest(base) | {"step": 13}
    (base / "manifest.json").write_text(json.dumps(changed))
    digests = "(?s)" + "|".join(f"{a}.*{b}" for a, b in [
        (digest(manifest(runs["sft"].workdir))[:12], digest(changed)[:12]),
        (digest(changed)[:12], digest(manifest(runs["sft"].workdir))[:12]),
    ])  # fmt: skip
    with pytest.raises(ValueError, match=digests):
        load(workdir)
    (workdir / "manifest.json").unlink()
    shutil.rmtree(workdir / "checkpoints/12")
    with pytest.raises(ValueError, match=digests):
        load(workdir)
    arguments = [flag.replace(str(runs["sft"].workdir), str(base)) for flag in runs["lora"].arguments]
    with pytest.raises(ValueError, match=digests):
        here("sft", f"--workdir={workdir}", *arguments)


def test_a_finished_run_that_goes_on_is_no_parent_until_it_is_finished_again(runs, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(runs["sft"].workdir, workdir)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        here("sft", f"--workdir={workdir}", *runs["sft"].arguments, "--config.num_train_steps=20")
    with pytest.raises(ValueError, match="has not finished"):
        read_run(str(workdir)).digest()


def test_scores_are_the_shifted_rewards_in_the_order_of_the_file(runs, records, tmp_path):
    workdir = runs["reward"].workdir
    pairs = [json.loads(line) for line in pathlib.Path(records["preferences_eval"]).read_text().splitlines()]
    asked = [
        {"prompt": pair["prompt"], "response": pair[kind], "id": [kind, i]}
        for i, pair in enumerate(pairs) for kind in ("rejected", "chosen")
    ]  # fmt: skip
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    done = command("reward", f"--workdir={workdir}", f"--config.score={tmp_path}/ask.jsonl", "--config.batch_size=8")
    assert done.returncode == 0, done.stderr
    scored = [json.loads(line) for line in (workdir / "scores.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in record.items() if k != "reward"} for record in scored] == asked
    rewards = {kind: np.array([r["reward"] for r in scored if r["id"][0] == kind]) for kind in ("chosen", "rejected")}
    assert rewards["chosen"].mean() == pytest.approx(0, abs=1e-5)  # the held-out set is what the shift is made from
    assert (rewards["chosen"] > rewards["rejected"]).mean() > 0.8
    model, shift = load(workdir), manifest(workdir)["reward_shift"]
    hidden = jax.jit(functools.partial(decoder.hidden_states, model.config))
    for record in scored[:2]:
        messages = [Message("user", record["prompt"]), Message("assistant", record["response"])]
        ids = model.template.encode(model.tokenizer, messages, loss_on="completion").ids
        last_D = np.float64(hidden(model.params, jnp.asarray(ids)[None])[0, -1])
        direct = last_D @ np.float64(model.params["head"]["kernel"])[:, 0] + float(model.params["head"]["bias"][0])
        assert record["reward"] == pytest.approx(direct - shift, abs=1e-4)


def test_the_report_card_is_kept_shown_and_in_the_manifest(runs):
    workdir = runs["reward"].workdir
    card = json.loads((workdir / "report_card.json").read_text())
    assert card["passed"] is True
    assert "Report card passed." in runs["reward"].done.stdout
    assert card["accuracy"]["pairs"] == 18
    assert manifest(workdir)["report_card"]["accuracy"] == card["accuracy"]
    page = (workdir / "report.html").read_text()
    assert "eport card" in page
    assert page.count("data:image/png") > len(list((workdir / "plots").glob("loss*.png")))


def test_a_mixture_of_tasks_has_the_loss_of_each_and_their_mean(finished, records, tmp_path):
    mixture = {name: {"path": records[name], "weight": weight} for name, weight in (("first", 1), ("last", 2))}
    here("sft", f"--workdir={tmp_path}", *finetuning("sft", "full", finished[0], mixture, samples__num_heldout=0))
    first, *_, last = rows(tmp_path)
    for row in (first, last):
        assert row["eval/loss"] == pytest.approx((row["eval/first/loss"] + row["eval/last/loss"]) / 2)
    for name in mixture:
        assert last[f"eval/{name}/loss"] < first[f"eval/{name}/loss"] - 0.5
    assert manifest(tmp_path)["data"]["train/last"]["rows"] > 0


def test_ranked_lists_without_a_held_out_set_train_every_parameter(runs, records, tmp_path):
    fields = {"data__holdout__fraction": 0, "reward__loss": "plackett_luce"}
    here(
        "reward",
        f"--workdir={tmp_path}",
        *finetuning("reward", "full", runs["sft"].workdir, records["ranked"], **fields),
    )
    *_, last = rows(tmp_path)
    assert last["reward/accuracy"] > 0.8
    assert math.isfinite(manifest(tmp_path)["reward_shift"])
    assert "report_card" not in manifest(tmp_path)
    assert load(tmp_path).config.head == "scalar"


def test_continued_pretraining_starts_where_its_parent_ended(finished, arguments, tmp_path):
    flags = [
        *arguments,
        f"--config.init_from={finished[0]}",
        "--config.num_train_steps=2",
        "--config.eval_at_start=true",
    ]
    here("pretrain", f"--workdir={tmp_path}", *flags)
    assert rows(tmp_path)[0]["eval/loss"] == pytest.approx(rows(finished[0])[-1]["eval/loss"], rel=1e-4)
    assert manifest(tmp_path)["parents"]["init_from"]["digest"] == digest(manifest(finished[0]))


RECORDS = {
    "field": '{"prompt": "Ann?", "response": "Bob."}\n{"prompt": "Bob?", "reponse": "Ann."}\n',
    "type": '{"prompt": "Ann?", "response": 3}\n',
    "role": '{"messages": [{"role": "user", "content": "Ann?"}, {"role": "asistant", "content": "Bob."}]}\n',
    "empty": '{"prompt": "Ann?", "response": "Bob."}\n\n{"prompt": "Bob?", "response": " "}\n',
    "equal": '{"prompt": "Ann?", "chosen": "Bob.", "rejected": "Cid."}\n{"prompt": "A?", "chosen": "A", "rejected": "A "}\n',
    "rejected": '{"prompt": "Ann?", "chosen": "Bob."}\n',
}  # fmt: skip
DIGEST = "[0-9a-f]{12}"
# stage, parent, further flags ({NAME} is a file or folder), what the one line on stderr says (regular expressions)
MISTAKES = {
    "a field that is missing": ("sft", "sft", ["--config.data.train={field}"],
                                ["field.jsonl, line 2", "'response'", "prompt, reponse"]),
    "a wrong type": ("sft", "sft", ["--config.data.train={type}"], ["type.jsonl, line 1", "'response'", "int"]),
    "an unknown role": ("sft", "sft", ["--config.data.train={role}"], ["role.jsonl, line 1", "'asistant'", "'assistant'"]),
    "an empty response": ("sft", "sft", ["--config.data.train={empty}"], ["empty.jsonl, line 3", "sft.empty_response"]),
    "equal responses": ("reward", "sft", ["--config.data.train={equal}"], ["equal.jsonl, line 2", "equal"]),
    "no rejected response": ("dpo", "sft", ["--config.data.train={rejected}"], ["rejected.jsonl, line 1", "'rejected'"]),
    "another tokenizer": ("sft", "finished", ["--config.data.tokenizer={tokenizer}"],
                          ["data.tokenizer", f"tokenizer {DIGEST}.*{DIGEST}"]),
    "another template": ("dpo", "sft", ["--config.chat_template=chatml"],
                         ["chat_template", f"template {DIGEST}.*{DIGEST}"]),
    "an unfinished parent": ("sft", "killed", [], ["init_from", "not finished"]),
    "a parent without logits": ("dpo", "reward", [], ["init_from", "reward model"]),
    "a packing that cuts": ("sft", "sft", ["--config.data.packing=concat"], ["data.packing", "best_fit"]),
    "scores without a reward model": ("reward", "sft", ["--config.score={first}", "--workdir={sft}"],
                                      ["--workdir", "not a finished reward model"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def mistakes(finished, runs, records, tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """What each of MISTAKES says."""
    root = tmp_path_factory.mktemp("mistakes")
    names = records | {name: run.workdir for name, run in runs.items()} | {"finished": finished[0]}
    for name, text in RECORDS.items():
        names[name] = root / f"{name}.jsonl"
        names[name].write_text(text)
    names |= {"killed": root / "killed", "tokenizer": root / "tokenizer"}
    shutil.copytree(runs["sft"].workdir, names["killed"])
    (names["killed"] / "manifest.json").unlink()
    (root / "corpus.txt").write_text("xyz " * 20)
    command("tokenizer", "--config=configs/tokenizer.py:char", f"--workdir={names['tokenizer']}",
            f"--config.data.train={root}/corpus.txt")  # fmt: skip

    def make(name: str) -> subprocess.CompletedProcess:
        stage, parent, flags, _ = MISTAKES[name]
        data = names["first" if stage == "sft" else "preferences"]
        flags = [*finetuning(stage, "full", names[parent], data), *(flag.format(**names) for flag in flags)]
        return command(stage, f"--workdir={root}/{name}", *flags)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        made = dict(zip(MISTAKES, pool.map(make, MISTAKES), strict=True))
    assert not any((root / name / "checkpoints").exists() for name in MISTAKES)
    return made


@pytest.mark.parametrize("name", MISTAKES)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(mistakes, name):
    done = mistakes[name]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for pattern in MISTAKES[name][3]:
        assert re.search(pattern, errors[0]), errors[0]

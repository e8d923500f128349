"""The project's own files: every config runs, and nothing is in them that does not belong there."""

import importlib
import pathlib
import re
import subprocess

import pytest

from configs import benchmark, evaluate, finalize, pretrain
from experiments import dpo, export_hf, import_hf, reward, sft
from experiments.benchmark import BenchmarkConfig
from experiments.chat import ChatConfig
from experiments.evaluate import EvaluateConfig
from experiments.generate import GenerateConfig
from experiments.make_data import Config as MakeData
from experiments.serve import ServeConfig
from experiments.shared import cli
from experiments.tokenizer import Config as TokenizerStage
from jaxgpt.finalize.config import FinalizeConfig
from jaxgpt.pipeline.graph import PipelineConfig
from jaxgpt.pipeline.sweep import SweepConfig
from jaxgpt.rl.config import RLConfig
from jaxgpt.train.config import PretrainConfig

ROOT = pathlib.Path(__file__).parents[1]
STAGES = {
    "pretrain": PretrainConfig,
    "tokenizer": TokenizerStage,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "serve": ServeConfig,
    "benchmark": BenchmarkConfig,
    "sft": sft.Config,
    "reward": reward.Config,
    "dpo": dpo.Config,
    "ppo": RLConfig,
    "grpo": RLConfig,
    "evaluate": EvaluateConfig,
    "finalize": FinalizeConfig,
    "make_data": MakeData,
    "pipeline": PipelineConfig,
    "arithmetic": PipelineConfig,
    "sweep": SweepConfig,
    "import_hf": import_hf.Config,
    "export_hf": export_hf.Config,
}
PRESETS = [
    *(("pretrain", name) for name in pretrain._PRESETS), ("tokenizer", ""), ("tokenizer", "char"),
    ("tokenizer", "quickstart"), ("benchmark", "cpu_14m"), ("benchmark", "gpt2_124m"), ("benchmark", "llama3_1b"),
    ("benchmark", "rl"),
    ("generate", ""), ("generate", "greedy"), ("generate", "nucleus"), ("chat", "sample"), ("chat", "greedy"), ("serve", ""),
    ("sft", "full"), ("sft", "lora"),
    ("sft", "quickstart"), ("reward", "full"), ("reward", "lora"), ("reward", "quickstart"), ("dpo", "full"),
    ("dpo", "lora"), ("ppo", "full"), ("ppo", "lora"), ("grpo", "grpo"), ("grpo", "dr_grpo"), ("grpo", "dapo"),
    ("grpo", "rloo"), ("grpo", "reinforce"), ("grpo", "best_of_n"), *(("evaluate", name) for name in evaluate._TASKS),
    *(("finalize", name) for name in finalize._PRESETS), ("make_data", "stdlib"), ("make_data", "arithmetic"),
    ("pipeline", "quickstart"), ("arithmetic", ""), ("ppo", "quickstart"),
    ("import_hf", ""), ("export_hf", ""), ("sweep", "grpo"), ("sweep", "pretrain"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "preset"), PRESETS)
def test_every_config_builds_its_stages_dataclass(stage, preset):
    built = cli.load_config(str(ROOT / f"configs/{stage}.py") + (f":{preset}" if preset else ""), [], STAGES[stage])
    assert isinstance(built, STAGES[stage])


def test_every_config_file_is_covered_and_says_how_it_is_run():
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem in ("__init__", "models"):
            continue
        assert path.stem in STAGES, f"{path} is exercised by no test"
        assert "python -m experiments." in importlib.import_module(f"configs.{path.stem}").__doc__


def test_experiments_holds_commands_alone():
    files = [path for path in sorted((ROOT / "experiments").glob("*.py")) if path.stem != "__init__"]
    assert len(files) > 15
    for path in files:
        assert '\nif __name__ == "__main__":\n' in path.read_text(), f"{path} is no command"


def test_a_benchmark_measures_a_pretraining_preset():
    built = cli.load_config(str(ROOT / "configs/benchmark.py"), [], BenchmarkConfig)
    assert built.train.model == cli.load_config(str(ROOT / "configs/pretrain.py:cpu_14m"), [], PretrainConfig).model
    assert benchmark.get_config().what == "train"


def tracked(*patterns: str) -> list[pathlib.Path]:
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.splitlines()]


def test_there_is_no_stub_and_no_path_of_one_machine():
    unfinished = re.compile(
        r"\bTO" + r"DO\b|\bFIX" + r"ME\b|NotImplemented" + r"Error|/home/\w|/ro" + r"ot/|/Us" + r"ers/"
    )
    for path in tracked("*.py", "*.md", "*.toml", "*.txt", "Makefile"):
        assert not unfinished.search(path.read_text()), path


def test_the_pinned_versions_name_no_place_to_get_them_from():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 50
    for line in lines:
        assert line.startswith("#") or re.fullmatch(r'[\w.-]+==[\w.+]+( ; python_version (<|>=) "3\.12")?', line), line


def test_every_instruction_to_install_an_extra_installs_the_clone():
    """The name is no project of the package index: `pip install jaxgpt` would install nothing, or somebody else's code."""
    wanted = re.compile(r"pip install [^\n]*jaxgpt")
    files = tracked("*.py", "*.md", "*.toml", "*.yaml", "*.sh", "Makefile")
    assert not [path for path in files if wanted.search(path.read_text()) and path != pathlib.Path(__file__)]

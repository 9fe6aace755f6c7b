"""The workflows of GitHub: well-formed, calling what there is, agreeing with the package about versions."""

import re
import tomllib

import pytest
import yaml
from places import ROOT

FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))


def steps(workflow):
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_yaml_whose_steps_do_something(workflow):
    assert steps(workflow)
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))
        for script in re.findall(r"scripts/\S+", step.get("run", "")):
            assert (ROOT / script).is_file()


def test_the_checks_are_those_of_the_local_run():
    assert "scripts/test.sh" in [step.get("run") for step in steps(FOLDER / "ci.yml")]
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_oldest_transformers_is_checked_too():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (needed,) = (name for name in project["project"]["dependencies"] if name.startswith("transformers"))
    matrix = yaml.safe_load((FOLDER / "ci.yml").read_text(encoding="utf-8"))["jobs"]["test"]["strategy"][
        "matrix"
    ]
    assert needed == f"transformers>={matrix['include'][0]['transformers'].removesuffix('.0')}"


def test_all_agree_on_the_oldest_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    oldest = re.fullmatch(r">=3\.(\d+)", project["project"]["requires-python"])[1]
    matrix = yaml.safe_load((FOLDER / "ci.yml").read_text(encoding="utf-8"))["jobs"]["test"]["strategy"][
        "matrix"
    ]
    setup = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    assert min(matrix["python"], key=lambda version: int(version.split(".")[1])) == f"3.{oldest}"
    assert project["tool"]["ruff"]["target-version"] == f"py3{oldest}"
    assert f"sys.version_info < (3, {oldest})" in setup
    assert f"Python 3.{oldest} or newer" in setup


def test_wheels_are_built_for_all_gpus_by_the_cuda_that_is_installed_for_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["cibuildwheel"]
    assert wheel["config-settings"] == {"cmake.define.DBRXQ_CUDA_ARCHITECTURES": "all"}
    script = ROOT / re.search(r"scripts/\S+", wheel["before-all"])[0]
    version = re.fullmatch(r"/usr/local/cuda-(12\.\d+)/bin/nvcc", wheel["environment"]["CUDACXX"])[1]
    assert f"cuda-nvcc-{version.replace('.', '-')} " in script.read_text(encoding="utf-8")
    assert (
        int(version.split(".")[1]) >= 8
    )  # the first that knows Blackwell; 13 would need drivers from 580 on


def test_hooks_before_a_commit_run_what_the_development_environment_has():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {re.split(r"[^\w-]", name)[0] for name in project["project"]["optional-dependencies"]["dev"]}
    of_hooks = {"trailing-whitespace-fixer": "pre-commit-hooks", "end-of-file-fixer": "pre-commit-hooks"}
    for hook in config["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        program = hook["entry"].split()[0]
        assert of_hooks.get(program, program) in packages, f"{program} is not in the extra dev"

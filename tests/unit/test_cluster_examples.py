"""The files in examples/cluster: that they are what they say, as far as that can be known without a cloud."""

import json
import re
import shlex
from pathlib import Path

import click
import jsonschema
import ray
import yaml

from cineray.jobs.cli.main import cineray
from cineray.jobs.cli.options import run_options
from cineray.jobs.gangs import metrics

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "cluster"


def options_of(entrypoint: str) -> dict:
    """What `cineray render` understands of a command; raises on an unknown option."""
    words = shlex.split(entrypoint)
    assert words[:4] == ["python", "-m", "cineray", "render"]
    return cineray.commands["render"].make_context("render", words[4:]).params


def test_the_ray_up_cluster_keeps_rays_schema():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((EXAMPLES / "ray-up.yaml").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]


def test_the_rayjob_renders_what_its_nodes_can_hold():
    job = yaml.safe_load((EXAMPLES / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    options = options_of(spec["entrypoint"])
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    ranks = options["sp"] * (1 + options["cfg_parallel"])
    assert int(limits["nvidia.com/gpu"]) % ranks == 0
    assert int(limits["nvidia.com/gpu"]) * workers["replicas"] == ranks * options["num_gangs"]
    assert int(limits["cpu"]) > int(limits["nvidia.com/gpu"])
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert "RAY_JOB_STOP_WAIT_TIME_S" in yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    mounted = {v["name"] for v in workers["template"]["spec"]["volumes"]}
    assert {m["name"] for m in workers["template"]["spec"]["containers"][0]["volumeMounts"]} <= mounted


def test_the_dashboard_draws_every_metric_and_no_other():
    dashboard = json.loads((EXAMPLES / "grafana.json").read_text())
    drawn = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    names = set(re.findall(r'"(cineray_\w+)"', Path(metrics.__file__).read_text()))
    assert len(names) == 10
    found = {re.sub(r"_(total|bucket)$", "", name) for name in re.findall(r"ray_(cineray_\w+)", drawn)}
    assert found == names


def test_the_docs_have_a_row_for_every_option_of_a_run_and_for_no_other():
    text = (EXAMPLES.parents[1] / "docs" / "ray.md").read_text()
    rows = re.findall(r"^\| `(--[a-z-]+)", text, re.MULTILINE)
    run = click.command()(run_options(lambda **_: None))
    assert sorted(rows) == sorted(option for param in run.params for option in param.opts)
    in_render = {option for param in cineray.commands["render"].params for option in param.opts}
    assert set(rows) <= in_render

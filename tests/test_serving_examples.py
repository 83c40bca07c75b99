"""`examples/serving`: manifests against the schemas that Kubernetes and KServe publish, and what the docs promise of them.

The schemas come from packages that are far too big for every run: `make long` installs them to a folder of its own.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmguard import cli

yaml = pytest.importorskip("yaml")

SERVING = Path(__file__).parents[1] / "examples" / "serving"
MANIFESTS = ("kubernetes.yaml", "kserve.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((SERVING / name).read_text(encoding="utf-8")))


def pods() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every pod's spec, and its one container."""
    for document in documents("kubernetes.yaml"):
        if document["kind"] == "Deployment":
            pod = document["spec"]["template"]["spec"]
            yield pod, pod["containers"][0]
    for document in documents("kserve.yaml"):
        yield document["spec"]["predictor"], document["spec"]["predictor"]["model"]


def test_nothing_runs_as_root_or_writes_where_it_should_not() -> None:
    found = list(pods())
    assert len(found) == 2
    for pod, container in found:
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_parts_of_a_manifest_name_each_other() -> None:
    by_kind = {document["kind"]: document for document in documents("kubernetes.yaml")}
    labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert by_kind["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert (
        by_kind["Service"]["spec"]["selector"]
        == by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
        == labels
    )
    scaled = by_kind["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert scaled == {"apiVersion": "apps/v1", "kind": "Deployment", "name": by_kind["Deployment"]["metadata"]["name"]}
    (_, container), _ = pods()
    (port,) = container["ports"]
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    assert [probe["port"] for probe in (*probes, {"port": by_kind["Service"]["spec"]["ports"][0]["targetPort"]})] == (
        [port["name"]] * 4
    )


def test_what_the_deployment_asks_of_the_server_are_its_options() -> None:
    from typer.main import get_command

    known = {option for one in get_command(cli.app).commands["serve"].params for option in one.opts}  # pyright: ignore
    (_, container), _ = pods()
    entrypoint = re.search(r"^ENTRYPOINT (.+)$", (SERVING / "Dockerfile").read_text(), re.MULTILINE)
    assert entrypoint is not None
    words = [*yaml.safe_load(entrypoint[1]), *container["args"]]
    assert words[:2] == ["vlmguard", "serve"]
    assert {word for word in words if word.startswith("--")} <= known
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert words[2] in mounts and str(Path(words[words.index("--api-key-file") + 1]).parent) in mounts


@pytest.mark.parametrize("name", ["Dockerfile", "triton.Dockerfile"])
def test_images_have_this_source_and_another_user_than_root(name: str) -> None:
    lines = (SERVING / name).read_text(encoding="utf-8").splitlines()
    words = {line.split()[0] for line in lines if line and not line.startswith("#")}
    assert words <= {"FROM", "RUN", "COPY", "USER", "ENV", "EXPOSE", "ENTRYPOINT", "CMD"}
    text = "\n".join(lines)
    copied = re.search(r"^COPY \. (\S+)$", text, re.MULTILINE)
    assert copied is not None  # the clone, because the package is in no index
    assert re.search(
        rf"^RUN pip install --no-cache-dir \"?{copied[1]}(\[serve,cpu\])?\"? && rm -r {copied[1]}", text, re.MULTILINE
    )
    assert int(re.findall(r"^USER (\d+)$", text, re.MULTILINE)[-1]) > 0


# Published schemas

VALIDATE = """
import sys, yaml
sys.path.insert(0, sys.argv[1])
import kubernetes_validate
for document in yaml.safe_load_all(open(sys.argv[2])):
    version = kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    print(document["kind"], version)
"""


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kubernetes' JSON schemas, and the models that KServe generates from its custom resources; read, never imported."""
    folder = tmp_path_factory.mktemp("schemas")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(folder)]
    subprocess.run([*install, "kubernetes-validate>=1.30", "pyyaml"], check=True, timeout=600)
    subprocess.run([*install, "--no-deps", "kserve>=0.15", "kubernetes>=30"], check=True, timeout=600)
    return folder


def kubernetes_says(schemas: Path, file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", VALIDATE, str(schemas), str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.long
@pytest.mark.slow
def test_kubernetes_reads_its_manifest(schemas: Path, tmp_path: Path) -> None:
    done = kubernetes_says(schemas, SERVING / "kubernetes.yaml")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "Deployment",
        "Service",
        "HorizontalPodAutoscaler",
        "PodDisruptionBudget",
    ]
    typo = tmp_path / "typo.yaml"
    typo.write_text(
        (SERVING / "kubernetes.yaml").read_text().replace("readOnlyRootFilesystem", "readonlyRootFilesystem")
    )
    assert kubernetes_says(schemas, typo).returncode != 0


@pytest.mark.long
@pytest.mark.slow
def test_kserve_reads_its_manifest(schemas: Path) -> None:
    (document,) = documents("kserve.yaml")
    assert (document["apiVersion"], document["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    models = published_models(schemas)
    assert list(wrong(models, "V1beta1InferenceService", document, "")) == []
    document["spec"]["predictor"]["scaleTargets"] = document["spec"]["predictor"].pop("scaleTarget")
    document["spec"]["predictor"]["model"]["securityContext"]["readOnlyRootFilesystem"] = "yes"
    assert list(wrong(models, "V1beta1InferenceService", document, "")) == [
        ".spec.predictor.model.securityContext.readOnlyRootFilesystem is 'yes', not bool",
        ".spec.predictor.scaleTargets is unknown",
    ]


Model = dict[str, str]  # JSON key -> type


def published_models(schemas: Path) -> dict[str, Model]:
    """Every generated class: what it says of its attributes."""
    found = {}
    for path in (*schemas.glob("kserve/models/*.py"), *schemas.glob("kubernetes/client/models/v1_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                assigned = [
                    one for one in node.body if isinstance(one, ast.Assign | ast.AnnAssign) and one.value is not None
                ]
                targets = {ast.unparse(getattr(one, "target", None) or one.targets[0]): one.value for one in assigned}
                wanted = ("openapi_types", "attribute_map")
                said = {name: ast.literal_eval(targets[name]) for name in wanted if name in targets}
                if "openapi_types" in said:
                    types, keys = said["openapi_types"], said["attribute_map"]
                    found[node.name] = {keys[name]: kind for name, kind in types.items()}
    return found


SCALARS: dict[str, type] = {"str": str, "bool": bool, "int": int, "float": float}


def wrong(models: dict[str, Model], kind: str, value: Any, where: str) -> Iterator[str]:
    """What the published model does not know, or knows as something else; required fields are the cluster's to ask for."""
    listed, mapped = re.fullmatch(r"[Ll]ist\[(.+)\]", kind), re.fullmatch(r"[Dd]ict[(\[]str, (.+)[)\]]", kind)
    if listed:
        for at, one in enumerate(value):
            yield from wrong(models, listed[1], one, f"{where}[{at}]")
    elif mapped:
        for key, one in value.items():
            yield from wrong(models, mapped[1], one, f"{where}.{key}")
    elif kind in SCALARS:
        if type(value) is not SCALARS[kind]:
            yield f"{where} is {value!r}, not {kind}"
    elif kind in models:
        for key, one in sorted(value.items()):
            if key in models[kind]:
                yield from wrong(models, models[kind][key], one, f"{where}.{key}")
            else:
                yield f"{where}.{key} is unknown"
    else:
        assert kind in ("object", "IntOrString", "ResourceQuantity"), f"{where}: nothing is known of {kind}"

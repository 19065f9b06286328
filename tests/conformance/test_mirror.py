"""The two packages mirror each other: same files, same public names, same signatures. Read from the source, so it runs anywhere.

Annotations count too, with each framework's array and module called by one name. What only one side has is listed here with its reason.
"""

import ast
import inspect
import pathlib
import re

import pytest

from tests.conformance import subjects

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = {"jax": ROOT / "smedjan_jax", "mlx": ROOT / "smedjan_mlx"}

ONE_SIDED_FILES = {
    "sharding.py": "JAX shards over devices by a mesh",
    "spread.py": "sums over the hosts of a run; in JAX they are those of its mesh",
    "startup.py": "XLA reads its flags once, before the device starts",
    "held.py": "asks a GPU whether JAX's kernels are their plain forms there",
    "products.py": "products of split matrices",
    **dict.fromkeys(("float8.py", "swiglu.py"), "MLX does not multiply in float8 with float32 sums"),
    "openblas.py": "MLX's wheel for a Linux CPU brings a slow BLAS",
    "mixers/cudnn.py": "cuDNN's attention through JAX; MLX brings its own kernels",
    **dict.fromkeys(
        (
            *(
                f"kernels/{name}.py"
                for name in ("tiles", "scalar_decay", "delta_rule", "channel_decay", "channel_tiles", "channel_pieces", "norm")
            ),
            *(f"kernels/{name}.py" for name in ("special", "compat", "float8", "channel_segments")),
            *(f"kernels/{name}.py" for name in ("conv", "rows", "shift", "loss", "shared_keys", "blocks", "segments", "decode_attention")),
        ),
        "kernels in Pallas, a part of JAX; MLX takes the plain forms",
    ),
    "checkpoint.py": "JAX's own checkpoint is Orbax; MLX's own is the neutral one",
}
ONE_SIDED_NAMES = {
    ("jax", "backend.py", "training_backend"): "--attention fused needs cuDNN; MLX's own kernel is on every device",
    ("jax", "mixers/attention.py", "refuse_fused"): "the same",
    ("jax", "backend.py", "Backend.shardings"): "where arrays lie on a mesh; MLX takes one device",
    **{
        ("jax", "kernels/__init__.py", name): "where JAX's kernels run and pay"
        for name in (
            "SIZES",
            "FASTER",
            "MEASURED",
            "REFUSED",
            "LARGEST",
            "LARGEST_FLOAT32",
            "LARGEST_VOCABULARY",
            "SHORTEST",
            "DECODED",
            "MOST_SHARING",
            "SHORTEST_RING",
            "for_decoding",
            "for_float8",
            "for_loss",
            "for_norms",
            "NORMED",
            "around",
            "for_blocks",
            "blocks_summary",
            "BLOCKS",
            "LONGEST_MASKED",
        )
    },
    ("jax", "decoder.py", "decoder_class"): "of --kernels plain; MLX has no kernels of this project",
    ("jax", "model.py", "folded"): "norms by one of JAX's kernels",
    ("jax", "modules.py", "Block.fold"): "the same",
    ("jax", "model.py", "linear_weights"): "they are cast before a mesh gathers them",
    ("jax", "teacher.py", "placed"): "its weights lie on a mesh",
    ("jax", "loss.py", "cross_entropy_by_kernel"): "by one of JAX's kernels",
    ("jax", "mixers/block_sparse.py", "FORMS"): "among them a kernel and cuDNN, which JAX has",
    ("jax", "mixers/block_sparse.py", "MOST_PASSES"): "JAX's choice by passes over the scores; MLX sorts them",
    ("mlx", "quantized.py", "product"): "MLX multiplies quantised weights as they are; in JAX products.py makes them whole",
    ("mlx", "quantized.py", "Quantized.times"): "the same",
    ("mlx", "quantized.py", "MOST_ROWS"): "the same",
    ("mlx", "precision.py", "on_gpu"): "MLX compiles and takes bfloat16 on a GPU only; JAX knows by itself",
}
SAME_WORDS = (
    (r"\b(jax\.Array|mx\.array)\b", "Array"),
    (r"\b(jnp\.dtype|mx\.Dtype)\b", "Dtype"),
    (r"\b(nnx|nn)\.Module\b", "Module"),
    (r"\b(smedjan_jax|smedjan_mlx)\b", "smedjan"),
    (r"\b(Jax|Mlx)(?=[A-Z])", ""),
)


def sources(package: str) -> dict[str, pathlib.Path]:
    root = PACKAGES[package]
    return {str(path.relative_to(root)): path for path in sorted(root.rglob("*.py"))}


def one_name(text: str) -> str:
    for pattern, word in SAME_WORDS:
        text = re.sub(pattern, word, text)
    return text


def public_names(path: pathlib.Path) -> dict[str, str]:
    """name -> how it is declared, for public functions, classes, their public methods and module constants."""
    found: dict[str, str] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = signature(node)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = "class(" + ", ".join(ast.unparse(base) for base in node.bases) + ")"
            methods = (item for item in node.body if isinstance(item, ast.FunctionDef))
            found |= {f"{node.name}.{method.name}": signature(method) for method in methods}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: "constant" for target in targets if isinstance(target, ast.Name)}
    private = re.compile(r"(^|\.)_(?!_(init|call)__$)")
    return {one_name(name): one_name(text) for name, text in found.items() if not private.search(name)}


def signature(node: ast.FunctionDef) -> str:
    """Parameters with kinds, defaults and annotations, what is returned, and decorators such as property."""
    decorators = "".join(
        f"@{ast.unparse(d)} " for d in node.decorator_list if ast.unparse(d) in {"property", "staticmethod", "classmethod"}
    )
    return f"{decorators}({ast.unparse(node.args)}) -> {ast.unparse(node.returns) if node.returns else 'unsaid'}"


def mirrored_files() -> list[str]:
    return sorted((sources("jax").keys() | sources("mlx").keys()) - ONE_SIDED_FILES.keys())


def test_both_packages_have_the_same_files():
    sides = [sources(package).keys() - ONE_SIDED_FILES.keys() for package in PACKAGES]
    assert sides[0] == sides[1], f"only on one side: {sorted(sides[0] ^ sides[1])}"


@pytest.mark.parametrize("file", mirrored_files())
def test_public_names_and_signatures_are_the_same(file: str):
    sides = []
    for package in PACKAGES:
        names = public_names(PACKAGES[package] / file)
        sides.append({name: text for name, text in names.items() if (package, file, name) not in ONE_SIDED_NAMES})
    jax_side, mlx_side = sides
    assert jax_side.keys() == mlx_side.keys(), f"{file}: only on one side: {sorted(jax_side.keys() ^ mlx_side.keys())}"
    drifted = {name: (jax_side[name], mlx_side[name]) for name in jax_side if jax_side[name] != mlx_side[name]}
    assert not drifted, f"{file}: " + "\n".join(f"{name}\n  jax {a}\n  mlx {b}" for name, (a, b) in drifted.items())


def test_exceptions_to_the_mirror_are_still_true():
    for package, file, name in ONE_SIDED_NAMES:
        other = "mlx" if package == "jax" else "jax"
        assert name in public_names(PACKAGES[package] / file), f"{name} is gone: strike it off the list"
        assert name not in public_names(PACKAGES[other] / file), f"{name} is on both sides: strike it off the list"


@pytest.mark.parametrize("file", mirrored_files())
def test_running_signatures_are_the_same(both_backends, file: str):
    """The same from the imported modules: what decorators and base classes leave of the signatures."""
    modules = [subjects.module(name, file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")) for name in both_backends]
    for name, declared in public_names(PACKAGES["jax"] / file).items():
        if declared == "constant" or "." in name or ("jax", file, name) in ONE_SIDED_NAMES:
            continue
        objects = [
            getattr(module, name, None) or getattr(module, prefix + name) for module, prefix in zip(modules, ("Jax", "Mlx"), strict=True)
        ]
        functions = [item.__init__ if inspect.isclass(item) else item for item in objects]  # Flax hides a class's own signature
        parameters = [[(p.name, p.kind, p.default) for p in inspect.signature(item).parameters.values()] for item in functions]
        assert parameters[0] == parameters[1], f"{file}: {name}"


def test_a_drift_is_caught(tmp_path: pathlib.Path):
    """A renamed argument, another default, a lost method: each changes what public_names says."""
    source = "class Model:\n    def __call__(self, tokens: mx.array, scale: float = 1.0) -> mx.array: ...\n    def hidden(self): ...\n"
    plain = tmp_path / "plain.py"
    plain.write_text(source)
    for old, new in (("scale:", "factor:"), ("1.0", "2.0"), ("hidden", "outputs"), ("-> mx.array", "-> float")):
        drifted = tmp_path / "drifted.py"
        drifted.write_text(source.replace(old, new))
        assert public_names(drifted) != public_names(plain)
    same = tmp_path / "same.py"
    same.write_text(source.replace("mx.array", "jax.Array"))
    assert public_names(same) == public_names(plain)

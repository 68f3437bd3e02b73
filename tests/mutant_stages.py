"""Which tests run against the mutants of each op and kernel: see mutate.py."""

from __future__ import annotations

Stage = list[str]  # arguments of one run of pytest

LAYERS: Stage = ["tests/ops/test_ops_layers.py", "tests/ops/test_ops_edges.py"]
TENSORS: Stage = ["tests/test_tensor_numpy.py", "tests/ops/test_ops_edges.py"]
ATTENTION: Stage = ["tests/ops/test_ops_attention_refusals.py", "tests/ops/test_ops_edges.py"]
GRADIENTS: Stage = ["tests/test_gradients.py"]
MODELS: Stage = ["tests/nn", "tests/models/test_gpt.py", "tests/models/test_generate.py"]
BY_HAND: Stage = ["tests/nn/test_layers_by_hand.py", "tests/nn/test_layers_by_hand_refusals.py"]
PEERS: Stage = ["tests/peers/test_ops_torch.py", "tests/peers/test_attention_torch.py"]
COMPILED_ROWS: Stage = ["tests/kernels/test_rowwise_cpu.py", "tests/kernels/test_pointwise_cpu.py"]
COMPILED_ATTENTION: Stage = ["tests/kernels/test_attention_cpu.py"]
LINEAR_ATTENTION: Stage = ["tests/ops/test_ops_linear_attention.py", "tests/kernels/test_linear_attention_cpu.py"]
USERS_FUNCTIONS: Stage = ["tests/kernels/test_attention_mods.py", "tests/kernels/test_attention_mods_compiled.py"]
OPTIMIZERS: list[Stage] = [
    [
        "tests/kernels/test_optimizer.py",
        "--deselect",
        "tests/kernels/test_optimizer.py::test_every_kernel_computes_on_whole_registers",
    ],
    ["tests/test_optim.py", "tests/test_clip.py"],
    ["tests/training/test_step.py", "tests/test_guard_pages.py", "tests/peers/test_optim_torch.py"],
]


def of_ops(*words: str) -> Stage:
    """The gradient table's lines, and the drawn calls, of these ops."""
    return [*GRADIENTS, "-k", " or ".join(words)]


# The tests of each file, the cheapest and likeliest first.
STAGES: dict[str, list[Stage]] = {
    "ops/activation.py": [["tests/ops/test_ops_activation.py"], GRADIENTS, PEERS],
    "ops/arithmetic.py": [TENSORS, GRADIENTS, ["tests/test_tensor.py"], PEERS],
    "ops/attention.py": [
        ATTENTION,
        of_ops("attention"),
        ["tests/ops/test_ops_attention.py"],
        MODELS,
        PEERS,
    ],
    "ops/decoder_layer.py": [BY_HAND, of_ops("decoder_layer"), MODELS],
    "ops/dropout.py": [LAYERS, of_ops("dropout"), MODELS],
    "ops/embedding.py": [LAYERS, of_ops("embedding"), ["tests/models/test_gpt_messages.py"], MODELS],
    "ops/encoder_layer.py": [BY_HAND, of_ops("encoder_layer"), MODELS],
    "ops/gpt_block.py": [["tests/models/test_gpt_block.py"], of_ops("gpt_block"), MODELS],
    "ops/linear.py": [LAYERS, of_ops("linear", "matmul", "einsum", "products"), TENSORS, PEERS],
    "ops/linear_attention.py": [LINEAR_ATTENTION, of_ops("linear_attention")],
    "ops/loss.py": [LAYERS, of_ops("loss", "kl_div", "cross_entropy"), ["tests/models/test_gpt.py"], PEERS],
    "ops/norm.py": [LAYERS, of_ops("norm"), PEERS],
    "ops/position.py": [LAYERS, of_ops("rope"), MODELS],
    "ops/reduce.py": [TENSORS, GRADIENTS, PEERS],
    "ops/shape.py": [TENSORS, GRADIENTS, PEERS],
    **{
        f"ops/{name}.py": [
            BY_HAND,
            of_ops("gpt_block", "encoder_layer", "decoder_layer"),
            ["tests/models/test_gpt_block.py"],
        ]
        for name in ("stream", "sublayers")
    },
    "kernels/__init__.py": [["tests/test_kernels_dispatch.py"], GRADIENTS],
    "kernels/philox.py": [["tests/kernels/test_pointwise_cpu.py"], COMPILED_ATTENTION],
    **{
        f"kernels/simd/{name}.py": [["tests/kernels/test_simd.py"], COMPILED_ROWS, COMPILED_ATTENTION]
        for name in ("__init__", "arithmetic", "functions", "registers", "tiles")
    },
    **{
        f"kernels/attention/{name}.py": [COMPILED_ATTENTION, of_ops("attention"), MODELS]
        for name in ("backward", "cpu", "forward", "layout", "rules")
    },
    **{
        f"kernels/attention/{name}.py": [USERS_FUNCTIONS, COMPILED_ATTENTION]
        for name in ("tile_rules", "user_code", "user_math", "user_source")
    },
    **{
        f"kernels/decode/{name}.py": [["tests/kernels/test_decode.py"], MODELS] for name in ("cpu", "reference", "step")
    },
    **{
        f"kernels/linear_attention/{name}.py": [LINEAR_ATTENTION, of_ops("linear_attention")]
        for name in ("cpu", "reference", "sweep")
    },
    **{
        f"kernels/pointwise/{name}.py": [["tests/kernels/test_pointwise_cpu.py"], GRADIENTS]
        for name in ("cpu", "dropout", "functions", "gelu")
    },
    **{
        f"kernels/rowwise/{name}.py": [["tests/kernels/test_rowwise_cpu.py"], GRADIENTS]
        for name in ("cpu", "norms", "rows", "softmax")
    },
    "kernels/attention/mods.py": [
        ["tests/kernels/test_mods.py"],
        USERS_FUNCTIONS,
        of_ops("attention"),
        ["tests/ops/test_ops_attention.py"],
    ],
    "kernels/attention/problem.py": [
        ATTENTION,
        of_ops("attention"),
        ["tests/ops/test_ops_attention.py", "tests/test_guard_pages.py", "tests/test_diagnose_files.py"],
    ],
    "kernels/attention/reference.py": [of_ops("attention"), ["tests/ops/test_ops_attention.py"], MODELS, PEERS],
    "kernels/optimizer/cpu.py": OPTIMIZERS,
    "kernels/optimizer/loops.py": OPTIMIZERS,
    "kernels/optimizer/reference.py": OPTIMIZERS,
    "kernels/pointwise/reference.py": [["tests/ops/test_ops_activation.py"], GRADIENTS, PEERS],
    "kernels/rowwise/reference.py": [LAYERS, ["tests/ops/test_ops_activation.py"], GRADIENTS, PEERS],
}

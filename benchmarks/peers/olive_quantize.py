"""What Olive makes of an ONNX model for a CPU: one workflow for each set of passes. Runs in Olive's own environment.

    olive_quantize.py MODEL CALIBRATION OUT

Each workflow's model goes to OUT/<name>/model.onnx. Passes and their settings are Olive's; per channel weights and
unsigned activations are set where its defaults are slower on a CPU with VNNI.
"""

import shutil
import sys
import traceback
from pathlib import Path

import numpy as np
from olive.data.registry import Registry
from olive.workflows import run

MODEL, CALIBRATION, OUT = (Path(argument).resolve() for argument in sys.argv[1:4])
CPU = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
DYNAMIC = {"type": "OnnxDynamicQuantization", "per_channel": True}
STATIC = {"type": "OnnxStaticQuantization", "data_config": "calibration", "per_channel": True, "precision": "int8"}
FUSED = {"type": "OrtTransformersOptimization", "model_type": "bert"}
WORKFLOWS = {
    "dynamic": [DYNAMIC],
    "static-u8s8": [{**STATIC, "activation_type": "uint8"}],
    "static-s8s8": [STATIC],
    "static-u8s8-matmul": [{**STATIC, "activation_type": "uint8", "op_types_to_quantize": ["MatMul", "Gemm"]}],
    "fused-dynamic": [FUSED, DYNAMIC],
    "fused-static-u8s8": [FUSED, {**STATIC, "activation_type": "uint8"}],
}


class Samples:
    """The calibration samples as batches of eight, in the form that Olive's data containers give."""

    def __init__(self):
        with np.load(CALIBRATION, allow_pickle=False) as archive:
            self.arrays = {name: archive[name] for name in archive.files if name != "labels"}

    def __len__(self):
        return len(next(iter(self.arrays.values()))) // 8

    def __iter__(self):
        for at in range(0, len(self) * 8, 8):
            yield {name: array[at : at + 8] for name, array in self.arrays.items()}, 0


@Registry.register_dataset()
def calibration_dataset(**_kwargs):
    return Samples()


@Registry.register_dataloader()
def calibration_loader(dataset, **_kwargs):
    return dataset


def workflow(name, passes):
    out = OUT / name
    run(
        {
            "input_model": {"type": "OnnxModel", "model_path": str(MODEL)},
            "systems": {"here": {"type": "LocalSystem", "accelerators": [CPU]}},
            "data_configs": [
                {
                    "name": "calibration",
                    "load_dataset_config": {"type": "calibration_dataset"},
                    "pre_process_data_config": {"type": "skip_pre_process"},
                    "post_process_data_config": {"type": "skip_post_process"},
                    "dataloader_config": {"type": "calibration_loader"},
                }
            ],
            "passes": {f"pass{number}": one for number, one in enumerate(passes)},
            "host": "here",
            "target": "here",
            "evaluate_input_model": False,
            "cache_dir": str(OUT / "cache"),
            "output_dir": str(out / "olive"),
            "log_severity_level": 3,
        }
    )
    made = next(path for path in (out / "olive").rglob("*.onnx"))
    shutil.copytree(made.parent, out, dirs_exist_ok=True)
    if made.name != "model.onnx":
        (out / made.name).rename(out / "model.onnx")


def main():
    for name, passes in WORKFLOWS.items():
        if (OUT / name / "model.onnx").exists():
            continue
        try:
            workflow(name, passes)
            print(f"olive {name}: made", flush=True)
        except Exception:
            print(f"olive {name}: failed: {traceback.format_exc().strip().splitlines()[-1][:200]}", flush=True)


if __name__ == "__main__":
    main()

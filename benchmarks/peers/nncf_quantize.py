"""nncf with OpenVINO by hand, as its documentation has it: convert, quantize, save.

    nncf_quantize.py MODEL CALIBRATION OUT KIND

KIND is transformer or none. The IR goes to OUT/model.xml. Runs in an environment of openvino, nncf and numpy.
"""

import sys
from pathlib import Path

import nncf
import numpy as np
import openvino


def main():
    model, calibration, out, kind = sys.argv[1:5]
    with np.load(calibration, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files if name != "labels"}
    rows = [
        {name: array[at : at + 1] for name, array in arrays.items()} for at in range(len(next(iter(arrays.values()))))
    ]
    made = nncf.quantize(
        openvino.convert_model(model),
        nncf.Dataset(rows),
        model_type=nncf.ModelType.TRANSFORMER if kind == "transformer" else None,
    )
    Path(out).mkdir(parents=True, exist_ok=True)
    openvino.save_model(made, str(Path(out) / "model.xml"))


if __name__ == "__main__":
    main()

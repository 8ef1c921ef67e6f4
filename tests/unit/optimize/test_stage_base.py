"""The contract around a stage, and how stages are found."""

import logging
import warnings
from importlib import metadata
from importlib.metadata import EntryPoint

import numpy as np
import onnx
import pytest

import optimize.stages as stages
from optimize.stages import broken_stages, find_stage, make_stage, onnx_files, stage_names
from optimize.stages.base import Context, Stage, StageParams
from optimize.testing import contents, samples_for, tiny_conv_net, tiny_transformer
from registry.errors import InputError, NotApplicableError, StageContractError, StageError
from registry.records import StageCall


class LevelParams(StageParams):
    level: int = 1
    symmetric: bool = False


class Doubling(Stage):
    """Scales the last weight, and does whatever else a test wants."""

    name = "test.doubling"
    Params = LevelParams
    tools = ("onnx",)
    params: LevelParams

    def apply(self, source, context):
        model = onnx_files.load(source)
        self.change(model)
        return self.written(context, onnx_files.save(model, context.out), "doubled")

    def change(self, model):
        model.doc_string = "changed"


def variation(**methods):
    return type("Variation", (Doubling,), methods)()


@pytest.fixture
def source(tmp_path):
    return tiny_conv_net(tmp_path / "source")


@pytest.fixture
def context(tmp_path):
    (tmp_path / "out").mkdir()
    return Context(out=tmp_path / "out")


def test_a_result_carries_the_signature_read_from_the_file(source, context):
    result = Doubling()(source, context)
    assert (result.inputs, result.outputs) == (source.inputs, source.outputs)
    assert (result.changed, result.notes, result.format) == (True, ("doubled",), "onnx")
    assert list(contents(result.folder)) == ["model.onnx"]


def test_parameters_have_defaults_and_are_recorded_in_full():
    assert Doubling({"level": 3}).call == StageCall(name="test.doubling", params={"level": 3, "symmetric": False})


def test_an_unknown_parameter_is_told_with_the_nearest():
    with pytest.raises(InputError, match="no parameter 'simetric'") as caught:
        Doubling({"simetric": True})
    assert "'symmetric'" in caught.value.hint


def test_a_value_that_does_not_fit_is_told():
    with pytest.raises(InputError, match="does not take 'high' for 'level'"):
        Doubling({"level": "high"})


def test_an_exception_of_a_library_is_wrapped_with_the_stages_name(source, context):
    def change(self, model):
        raise KeyError("weight_3")

    with pytest.raises(StageError, match=r"test\.doubling failed with KeyError.*weight_3") as caught:
        variation(change=change)(source, context)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_verdict_passes_through(source, context):
    def requires(self, source, context):
        raise NotApplicableError("no weights here")

    with pytest.raises(NotApplicableError, match="no weights here"):
        variation(requires=requires)(source, context)


def test_memory_errors_are_not_dressed_up(source, context):
    def change(self, model):
        raise MemoryError

    with pytest.raises(MemoryError):
        variation(change=change)(source, context)


def test_a_change_with_identical_bytes_breaks_the_contract(source, context):
    def change(self, model):
        pass

    (source.folder / "model.onnx").write_bytes(onnx_files.load(source).SerializeToString(deterministic=True))
    with pytest.raises(StageContractError, match="identical bytes"):
        variation(change=change)(source, context)


def rename_output(self, model):
    model.graph.node[-1].output[0] = model.graph.output[0].name = "other"


def test_a_renamed_output_breaks_the_contract(source, context):
    with pytest.raises(StageContractError, match=r"changed the outputs.*logits.*other"):
        variation(change=rename_output)(source, context)


def test_a_declared_change_of_signature_is_allowed(source, context):
    result = variation(change=rename_output, changes_signature=True)(source, context)
    assert result.outputs[0].name == "other"


def test_what_cannot_be_read_back_breaks_the_contract(source, context):
    def apply(self, source, context):
        (context.out / "model.onnx").write_bytes(b"not a model")
        return self.written(context, "model.onnx")

    with pytest.raises(StageContractError, match="cannot be read"):
        variation(apply=apply)(source, context)


def test_unchanged_hands_on_the_source_with_a_note(source, context):
    result = variation(apply=lambda self, source, context: self.unchanged(source, "nothing to do"))(source, context)
    assert (result.changed, result.folder, result.notes) == (False, source.folder, ("nothing to do",))


def test_another_format_is_refused(source, context):
    with pytest.raises(NotApplicableError, match="takes a model in the format openvino, not onnx"):
        variation(formats=("openvino",))(source, context)


def test_calibration_is_asked_for_and_must_fit(source, context, tmp_path):
    stage = variation(needs_calibration=True)
    with pytest.raises(NotApplicableError, match="needs calibration samples"):
        stage(source, context)
    wrong = Context(out=context.out, calibration={"picture": np.zeros((2, 3, 8, 8), np.float32)})
    with pytest.raises(InputError, match="picture"):
        stage(source, wrong)
    fits = Context(out=context.out, calibration=samples_for(source.inputs, count=2))
    assert stage(source, fits).changed


def test_a_folder_that_is_not_empty_is_refused(source, context):
    (context.out / "left.over").touch()
    with pytest.raises(StageContractError, match="empty folder"):
        Doubling()(source, context)


def test_a_library_cannot_quieten_our_log(source, context):
    def change(self, model):
        for one in (logging.root, *logging.root.handlers):
            one.setLevel(logging.CRITICAL)
        model.doc_string = "changed"

    before = [one.level for one in (logging.root, *logging.root.handlers)]
    variation(change=change)(source, context)
    assert [one.level for one in (logging.root, *logging.root.handlers)] == before


def test_noise_goes_to_the_log(source, context, capsys, caplog):
    def change(self, model):
        print("Collecting tensor data ...")
        warnings.warn("old option", DeprecationWarning, stacklevel=1)
        model.doc_string = "changed"

    with caplog.at_level(logging.DEBUG, logger="optimize.stages.base"):
        variation(change=change)(source, context)
    assert capsys.readouterr().out == ""
    assert "Collecting tensor data" in caplog.text
    assert "old option" in caplog.text


def test_scratch_is_gone_afterwards(context):
    with context.scratch() as scratch:
        (scratch / "big.bin").touch()
    assert [path.name for path in context.out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("name", stage_names())
def test_every_stage_of_the_house_is_found_under_its_own_name(name):
    assert find_stage(name).name == name


def test_an_unknown_stage_is_told_with_the_nearest():
    with pytest.raises(InputError, match=r"no stage 'quantize\.statik'") as caught:
        make_stage(StageCall(name="quantize.statik"))
    assert "'quantize.static'" in caught.value.hint


@pytest.fixture
def plugins(monkeypatch):
    def install(**values):
        found = [EntryPoint(name=name, value=value, group=stages.GROUP) for name, value in values.items()]
        monkeypatch.setattr(metadata, "entry_points", lambda group: found if group == stages.GROUP else [])

    return install


def test_a_plug_in_is_found(plugins):
    plugins(**{"simplify.ort2": "optimize.stages.simplify:OrtGraph"})
    assert "simplify.ort2" in stage_names()
    with pytest.raises(InputError, match="has another name"):
        find_stage("simplify.ort2")


def test_broken_plug_ins_are_listed_with_their_reason(plugins):
    plugins(
        **{
            "a.missing": "no_such_package.stages:Thing",
            "b.nothing": "optimize.stages.base:Context",
            "quantize.static": "optimize.stages.simplify:OrtGraph",
        }
    )
    reasons = broken_stages()
    assert sorted(reasons) == ["a.missing", "b.nothing", "quantize.static"]
    assert "ModuleNotFoundError" in reasons["a.missing"]
    assert "not a subclass of Stage" in reasons["b.nothing"]
    assert find_stage("quantize.static").__module__ == "optimize.stages.quantize"
    with pytest.raises(InputError, match="cannot be imported"):
        find_stage("a.missing")


def test_attention_is_seen_and_convolution_is_not(tmp_path):
    assert onnx_files.has_attention(onnx_files.load(tiny_transformer(tmp_path / "t")))
    assert not onnx_files.has_attention(onnx_files.load(tiny_conv_net(tmp_path / "c")))


def test_opsets_of_domains_that_no_node_is_of_are_not_written(tmp_path):
    model = onnx_files.load(tiny_conv_net(tmp_path / "source"))
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 5))
    onnx_files.save(model, tmp_path)
    written = onnx.load(str(tmp_path / onnx_files.ENTRY))
    assert [entry.domain for entry in written.opset_import] == [""]

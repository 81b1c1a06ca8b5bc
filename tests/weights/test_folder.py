"""What lies beside another library's weights, and what does not belong to them."""

import pytest

from dinoforge.errors import WeightsError
from dinoforge.weights.backbone import load_backbone
from other_libraries import HEADS, assert_outputs_equal, write_folder


def test_a_folder_without_configuration_says_what_is_assumed(tmp_path):
    model = write_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    back = load_backbone(tmp_path, HEADS)
    assert_outputs_equal(model, back)
    assert any("no config.json" in note and "GELU" in note for note in back.notes)


@pytest.mark.parametrize("text", ["[1]", "{", "5", "null", ""])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_configuration_that_is_no_object(tmp_path, name, text):
    write_folder(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(WeightsError, match=name):
        load_backbone(tmp_path)


def test_a_file_beside_a_configuration_of_something_else(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"port": 80}')
    back = load_backbone(tmp_path / "model.safetensors", HEADS)
    assert any("describes no model" in note for note in back.notes)
    with pytest.raises(WeightsError, match="no configuration of a Dinov2 model"):
        load_backbone(tmp_path, HEADS)

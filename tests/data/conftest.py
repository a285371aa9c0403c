import pytest

from jaxtune.data import load_tokenizer


@pytest.fixture(scope="module")
def qwen3(assets):
    return load_tokenizer(str(assets / "tokenizers" / "qwen3"))

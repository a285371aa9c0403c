"""peft 0.21's default target modules, by model family."""

LORA = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "stablelm", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "gptj", "opt"),
        ("q_proj", "v_proj"),
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), ("query", "value")),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    "bart": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
}
# (the targets, those of them whose input is scaled). peft's table has "w2" for Mixtral, no module in transformers 5.
IA3 = {
    **dict.fromkeys(("llama", "mistral"), (("k_proj", "v_proj", "down_proj"), ("down_proj",))),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), (("q_proj", "v_proj", "down_proj"), ("down_proj",))
    ),
    **dict.fromkeys(("bert", "roberta"), (("key", "value", "output.dense"), ("output.dense",))),
    "mixtral": (("k_proj", "v_proj"), ()),
    "t5": (("k", "v", "wo"), ("wo",)),
    "mt5": (("k", "v", "wi_1"), ()),  # as peft has it
    "bart": (("q_proj", "v_proj", "fc2"), ("fc2",)),
    "gpt2": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "opt": (("q_proj", "k_proj", "fc2"), ("fc2",)),
    "gptj": (("q_proj", "v_proj", "fc_out"), ("fc_out",)),
    "phi": (("q_proj", "v_proj", "fc2"), ("fc2",)),
    "gpt_neox": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
}

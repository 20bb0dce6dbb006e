"""One question: its example, and the answer streamed to the terminal."""

from __future__ import annotations

import torch
from transformers import TextStreamer

from support.batch import Example, Prompt
from support.images import read_image
from support.qwen_vl import Policy
from support.reward import boxed


def prompt_of(config, sets: dict, policy: Policy) -> Prompt:
    """The prompt of --ask and --image, or of --row. ValueError if there is none.

    config: protocol.EvalConfig; sets: name -> data.Rows.
    """
    if config.ask:
        images = [read_image(path) for path in config.image]
        markers = "" if "<image>" in config.ask else "<image>" * len(images)
        example = Example(markers + config.ask, "", images)
    else:
        split, _, row = config.row.rpartition(":")
        rows = sets.get(split or next(iter(sets)), ())
        if not row.isdigit() or int(row) >= len(rows):
            choices = [f"{name}:0 to {name}:{len(each) - 1}" for name, each in sets.items()]
            raise ValueError(f"--row {config.row}: choose one of {', '.join(choices)}")
        example = rows[int(row)]
    prompt = policy.encoder.encode(example)
    if config.explain and prompt.pixel_values is None:
        raise ValueError("--explain: the example has no image")
    return prompt


@torch.no_grad()
def ask(policy: Policy, prompt: Prompt, config) -> None:
    """Print the response as it is generated (transformers' own generate), then its box.

    config: protocol.EvalConfig.
    """
    inputs = {
        "input_ids": prompt.input_ids[None],
        "attention_mask": torch.ones_like(prompt.input_ids[None]),
        # Without token types Qwen2.5-VL falls back silently to one-dimensional positions.
        "mm_token_type_ids": prompt.is_image_token[None].int(),
    }
    if prompt.pixel_values is not None:
        inputs["pixel_values"] = prompt.pixel_values
        inputs["image_grid_thw"] = prompt.image_grid_thw
    how = {"do_sample": False}
    if config.temperature:
        names = ("temperature", "top_p", "top_k")
        how = {"do_sample": True} | {name: getattr(config, name) for name in names}
    torch.manual_seed(config.seed)
    tokenizer = policy.encoder.tokenizer
    tokens = policy.model.generate(
        **{name: value.to(policy.device) for name, value in inputs.items()},
        **how,
        max_new_tokens=config.max_new_tokens,
        suppress_tokens=policy.suppressed_ids,
        repetition_penalty=1.0,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    response = tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)
    found = boxed(response)
    print("boxed:", "nothing, the response has no \\boxed{...}" if found is None else found)

"""The `pack` command: write a model's weights in the layout of the native engine, so that it starts faster."""

from __future__ import annotations

import shutil
from pathlib import Path

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.decode.packed.file import save
from sparsecli.decode.packed.folder import pack_folder
from sparsecli.decode.packed.precision import Precision
from sparsecli.model.files import CONFIG, MODEL_TYPE, PACKED, check_weights, find_model, read_description
from sparsecli.model.outputs import check_new, written_beside
from sparsecli.model.remote_code import REMOTE_CODE
from sparsecli.model.tokenizer import FILES, read_tokenizer


def run(*, model: str | None, output: Path | None, dtype: str, dry_run: bool = False) -> None:
    """Write a model folder with packed weights of one type, by default beside the original.

    Raises:
        Failure: there is no model, it is damaged or has an encoder, or the output exists or cannot be written.
    """
    source = find_model(model, types=(MODEL_TYPE,))
    spec = read_description(source).spec
    if spec.encoder:
        raise Failure(
            f"{source}: a model with an encoder cannot be packed; its encoder runs in PyTorch from these files"
        )
    if kinds := spec.quantization.gguf:
        names = ", ".join(sorted({*kinds.values()}))
        raise Failure(
            f"{source}: the weights keep the codes of their GGUF file ({names}), which the engine reads as they are; "
            "to pack another type, import the file with --dtype float32"
        )
    read_tokenizer(source, spec.vocabulary.size)
    check_weights(source, spec)
    if output is None:
        named = source if source.name else source.absolute()
        output = named.with_name(f"{named.name}-{dtype}")
    check_new(output)
    copied = [name for name in (CONFIG, REMOTE_CODE, *FILES) if (source / name).is_file()]
    if dry_run:
        console.print_table(
            ["plan", ""],
            [
                ("model", str(source)),
                ("weights", dtype),
                ("files", f"{', '.join([PACKED, *copied])} in {output}"),
            ],
        )
        return
    packed = pack_folder(source, spec, Precision.of(dtype))
    with written_beside(output) as made:
        for name in copied:
            shutil.copyfile(source / name, made / name)
        save(packed, made / PACKED)
    console.say(
        f"wrote {output} ({packed.nbytes / 1e6:,.1f} MB of weights); sparsecli generate --model {output}"
    )

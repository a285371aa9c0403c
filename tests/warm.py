"""What `runs.start` has its server of processes import, once: no torch, as in the command, and no device looked for."""

from jaxtune import torchless

torchless.hide()

import transformers.models.auto.tokenization_auto  # noqa: E402, F401

import jaxtune.commands.sweep  # noqa: E402
import jaxtune.commands.train  # noqa: E402
import jaxtune.report  # noqa: E402
import jaxtune.run.running  # noqa: E402, F401

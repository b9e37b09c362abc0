"""Chat templates, found and rendered by transformers, one conversation at a time, within bounds.

A template is a program of its author's: transformers' sandbox keeps it from files and the interpreter, and here it is
kept from taking minutes or gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.errors import first_line
from dist_train.errors import UserError
from dist_train.runtime.bounds import TooSlowError, bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Templates = str | dict[str, str] | None
"""one, several by name, or none"""

_FOLDER = Path(__file__).parent / "templates"
_PACKAGED = sorted(path.stem for path in _FOLDER.glob("*.jinja"))
_SECONDS = 5.0  # of CPU time for one conversation; what serves in practice takes a ten-thousandth of it
_MEMORY = 2 << 30
_MORE_CHARACTERS, _TIMES_LONGER = 1_000_000, 8  # than what the messages say: a template's own text, and repetitions
_PROBE = "Which bird is it?"


class RefusedChatError(UserError):
    """A template refuses one conversation, as those do that know only some orders of roles: others are well."""


class ChatTemplate:
    """The chat template of a tokenizer, which messages call `source`."""

    def __init__(self, renderer: PreTrainedTokenizerBase, source: str) -> None:
        self._renderer: Any = renderer
        self._source = source

    @property
    def stored(self) -> Templates:
        """As it is stored with the tokenizer."""
        templates: Templates = self._renderer.chat_template
        return templates

    def render(self, messages: Sequence[Message], *, answered: bool = False) -> str:
        """The text of a conversation up to where the assistant's next answer begins, or `answered`, up to its end.

        Raises RefusedChatError where the template refuses these messages, and UserError where there is none, or it
        cannot be rendered.
        """
        if self._wants_parts:
            messages_of_parts = [{**message, "content": _as_parts(message["content"])} for message in messages]
            return self._render(messages_of_parts, answered=answered)
        return self._render(messages, answered=answered)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template reads a message as a list of parts, as servers then give it; found by trial.

        Raises UserError where a message comes out neither way.
        """
        if not self.stored:
            raise UserError(
                f"{self._source}: has no chat template; name the one that the target is served with, "
                f"chat_template=FILE (a Jinja file, or one of {', '.join(_PACKAGED)})"
            )
        try:
            if _PROBE in self._render([{"role": "user", "content": _PROBE}]):
                return False
            if _PROBE in self._render([{"role": "user", "content": _as_parts(_PROBE)}]):
                return True
        except RefusedChatError:  # a lone user message; what else it takes is not known
            return False
        raise UserError(f"{self._source}: its chat template does not keep what a user says; {_MEND}")

    def _render(self, messages: Sequence[Mapping[str, Any]], *, answered: bool = False) -> str:
        import jinja2

        broken = f"{self._source}: its chat template cannot be rendered: "
        try:
            with bounded(_SECONDS, _MEMORY):
                text: str = self._renderer.apply_chat_template(
                    list(messages), add_generation_prompt=not answered, tokenize=False
                )
        except TooSlowError:
            raise UserError(f"{broken}it takes more than {_SECONDS:.0f} s for one conversation; {_MEND}") from None
        except MemoryError:
            raise UserError(f"{broken}it takes more than {_MEMORY >> 30} GiB for one conversation; {_MEND}") from None
        except Exception as error:  # what an expression of the template can raise is no narrower
            if type(error) is jinja2.TemplateError:  # raise_exception() of transformers; jinja2's own are subclasses
                reason = f"{self._source}: its chat template refuses the conversation: {first_line(error)}"
                raise RefusedChatError(reason) from None
            raise UserError(f"{broken}{type(error).__name__}: {first_line(error)}; {_MEND}") from None
        said = sum(len(str(message["content"])) for message in messages)
        if len(text) > _TIMES_LONGER * said + _MORE_CHARACTERS:
            raise UserError(f"{broken}it makes {len(text):,} characters of {said:,}; {_MEND}")
        return text


_MEND = "mend it, or name another, chat_template=FILE"


def _as_parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def read_template(name: str) -> str:
    """The text of a template: a Jinja file, or one that comes with dist-train, by name.

    Raises UserError where there is no such file, or it cannot be read.
    """
    path = Path(name)
    if name in _PACKAGED and not path.exists():
        path = _FOLDER / f"{name}.jinja"
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(
            f"chat_template={name}: {reason}; name a Jinja file, or one of {', '.join(_PACKAGED)}"
        ) from error


def template_reader(folder: Path | None, defaults: Mapping[str, str]) -> PreTrainedTokenizerBase:
    """transformers' reader of the templates and the names of special tokens in a folder, without a vocabulary.

    `defaults`: special tokens that the folder does not name; None: there is no folder. Raises UserError where
    transformers cannot read what is there.
    """
    from transformers import PreTrainedTokenizer

    class TemplateReader(PreTrainedTokenizer):
        vocab_files_names: dict[str, str] = {}  # noqa: RUF012, as the base class has it
        vocab_size = 0

        def __init__(self, **options: Any) -> None:
            options.pop("added_tokens_decoder", None)
            super().__init__(**{**defaults, **options})

        def get_vocab(self) -> dict[str, int]:
            return {}

        def _convert_token_to_id(self, token: str) -> int:
            return 0

    if folder is None:
        return TemplateReader()
    try:
        return TemplateReader.from_pretrained(folder)
    except Exception as error:  # what transformers raises for a strange configuration is no narrower
        raise UserError(f"{folder}: its chat template cannot be read: {first_line(error)}") from error

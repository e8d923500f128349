"""The commands of experiments.chat: lines in, printed text out."""

import dataclasses
import difflib
import json
import signal
from collections.abc import Callable

from jaxgpt import config as config_lib
from jaxgpt.generate.dialogue import Dialogue, Speech
from jaxgpt.generate.engine import MAX_ALTERNATIVES
from jaxgpt.generate.samplers import SamplerConfig

HELP = f"""\
/set NAME VALUE   change {", ".join(f.name for f in dataclasses.fields(SamplerConfig))},
                  max_new_tokens or seed; /set alone shows them
/probs [N]        the N most probable first tokens of the last response, or of what comes next where the model has no
                  chat template (10; at most {MAX_ALTERNATIVES})
/retry            draw the last response again
/system TEXT      what stands before the first turn; without TEXT nothing
/clear            forget the conversation
/save FILE        add the conversation to a .jsonl file, as a record that sft reads
/quit             the end; so is Ctrl-D
Everything else is a message. Ctrl-C breaks a response off."""


class Terminal:
    """What each line of the user's does."""

    def __init__(self, dialogue: Dialogue):
        self._dialogue = dialogue
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: print(HELP), "set": self._set, "probs": self._probs, "retry": self._retry,
            "system": self._dialogue.set_system, "clear": lambda _: self._dialogue.messages.clear(), "save": self._save,
        }  # fmt: skip

    def handle(self, line: str) -> None:
        """One line of the user's; a mistake, or whatever else goes wrong, is a sentence, and the conversation goes on."""
        name, _, argument = line[1:].partition(" ")
        try:
            if not line.startswith("/"):
                dropped = self._dialogue.ask(line)
                if dropped:
                    print(f"[The conversation no longer fits: its {dropped} oldest turn(s) were forgotten.]")
                self._respond()
            elif name in self._commands:
                self._commands[name](argument.strip())
            else:
                nearest = difflib.get_close_matches(name, self._commands, n=1, cutoff=0.0)[0]
                raise ValueError(f"There is no command /{name}; the nearest is /{nearest}, and /help lists all.")
        except ValueError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("[broken off]")
        except Exception as error:  # a conversation is not to be lost with its turn, whatever it is
            reason = " ".join(str(error).split())[:300]
            print(
                f"error: This turn failed ({type(error).__name__}: {reason}); the conversation is still there, try /retry."
            )

    def _respond(self) -> None:
        broken: list[int] = []
        before = signal.signal(signal.SIGINT, lambda number, _: broken.append(number))
        pieces = self._dialogue.respond()
        try:
            for text in pieces:
                print(text, end="", flush=True)
                if broken:
                    break
        finally:
            pieces.close()
            signal.signal(signal.SIGINT, before)
        print("" if self._dialogue.finish == "stop" else f" [{self._dialogue.finish or 'broken off'}]")

    def _retry(self, _: str) -> None:
        self._dialogue.take_back()
        self._respond()

    def _set(self, argument: str) -> None:
        values = config_lib.to_dict(self._dialogue.speech)
        sampler = values["sampler"]
        shown = {**sampler, "max_new_tokens": values["max_new_tokens"], "seed": values["seed"]}
        name, _, text = argument.replace("=", " ").partition(" ")
        if not name:
            print(", ".join(f"{name} {value}" for name, value in shown.items()))
            return
        if name not in shown:
            nearest = difflib.get_close_matches(name, shown, n=1, cutoff=0.0)[0]
            raise ValueError(f"There is nothing to set named {name!r}; the nearest is {nearest}.")
        config_lib.override(values, Speech, f"sampler.{name}" if name in sampler else name, text.strip())
        self._dialogue.speech = config_lib.build(Speech, values)

    def _probs(self, argument: str) -> None:
        if argument and not argument.isdecimal():
            raise ValueError(f"/probs takes a number of tokens, not {argument!r}.")
        for piece, probability in self._dialogue.probabilities(int(argument or 10)):
            print(f"  {probability:7.4f}  {piece}")

    def _save(self, path: str) -> None:
        if not path:
            raise ValueError("/save needs a file: /save FILE.")
        try:
            with open(path, "a", encoding="utf-8") as file:
                messages = [message._asdict() for message in self._dialogue.transcript()]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror}).") from error
        print(f"[{len(messages)} messages in {path}.]")

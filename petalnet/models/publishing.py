"""A folder with a model, put into a repository on the hub: as one commit, so that nobody ever finds half of it there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from petalnet.errors import PetalnetError, UsageError
from petalnet.models.unfinished import CONFIG_FILE, MODEL_PATTERNS, UNFINISHED

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class Repository:
    """A repository on the hub that a model is to be put into.

    Attributes:
        name: owner/name.
        private: whether it is to be.
        replace: whether a model that it holds may be replaced.
    """

    def __init__(self, name: str, *, token: str | bool | None = None, private: bool = False, replace: bool = False) -> None:
        self.name = name
        self.private = private
        self.replace = replace
        self._api = _api(token)

    def check(self) -> None:
        """Find out what would keep a model from being put there, as far as it shows before: so that nobody waits for hours to learn it.

        Raises:
            UsageError: the name is none, nobody is logged in, or what is there already is a model, or public where it is not to be.
            PetalnetError: the hub cannot be reached.
        """
        from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

        try:
            self._api.whoami()
            held = self._api.file_exists(self.name, CONFIG_FILE)
            public = self.private and self._api.repo_exists(self.name) and not self._api.repo_info(self.name).private
        except LocalTokenNotFoundError as error:
            raise UsageError("the hub wants to know who you are: log in with `hf auth login`, or pass --token") from error
        except (HTTPError, OSError, ValueError) as error:
            raise self._refusal("cannot be used", error) from error
        if held and not self.replace:
            raise UsageError(f"{self.name} holds a model already: name another repository, or replace that with --force")
        if public:
            raise UsageError(f"{self.name} is there already, and public: name another repository, or leave out --private")

    def put(self, folder: Path) -> str:
        """Put all of a folder into the repository, which is made where it is not there. Returns the address of the commit.

        Raises:
            PetalnetError: it could not be done; the folder is unharmed, and the repository as it was.
        """
        from huggingface_hub.errors import HTTPError

        try:
            self._api.create_repo(self.name, private=self.private or None, exist_ok=True)
            done = self._api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                commit_message="A model, block by block",
                ignore_patterns=[f"{UNFINISHED}/*"],
                delete_patterns=list(MODEL_PATTERNS) if self.replace else None,
            )
        except (HTTPError, OSError, ValueError, RuntimeError) as error:  # uploading threads hand on what they met as RuntimeError
            again = f"{folder} is complete; try again with `hf upload {self.name} {folder}`"
            raise self._refusal("could not be filled", error, again) from error
        return str(done.commit_url)

    def _refusal(self, what: str, error: Exception, more: str = "") -> PetalnetError:
        from huggingface_hub.errors import HFValidationError

        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, HFValidationError):
            return UsageError(f"{self.name} is not the id of a hub repository (owner/name)")
        return PetalnetError(f"the repository {self.name} {what}: {reason}{'; ' if more else ''}{more}")


def _api(token: str | bool | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="petalnet")

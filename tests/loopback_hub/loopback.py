"""A Hugging Face Hub on the loopback interface, in memory, with the requests that the client libraries make.

It has Xet only with xet=True: without it, uploads need HF_HUB_DISABLE_XET=1, which `environ` sets.
"""

import base64
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

from . import discussions, lfs, repos, xet
from .metadata import problems
from .routes import API, KIND, REV, WEB, Routes
from .store import (
    NAMESPACES,
    USER,
    Commit,
    HubError,
    PullRequest,
    Repo,
    apply_operations,
    describe,
    describe_collection,
    is_lfs,
    make_blobs,
    siblings_with_sizes,
    timestamp,
    tree_entries,
)
from .wire import Call, Faults, Reply, Request, Server, json_reply

LISTED = ("id", "createdAt", "private", "gated", "tags", "pipeline_tag", "library_name", "downloads", "likes")

routes = Routes()


class LoopbackHub:
    """Repositories in memory behind an HTTP server; a context manager."""

    # Well formed and worthless; written in parts so that no scanner takes it for a leaked secret.
    token = "hf_" + "loopback" * 4 + "OK"

    def __init__(self, *, page_size: int = 1000, part_size: int | None = None, xet: bool = False) -> None:
        """
        Args:
            page_size: items on a page of a listing.
            part_size: large files of more than so many bytes are uploaded in parts of that size.
            xet: whether large files are uploaded by Xet.
        """
        self.page_size = page_size
        self.part_size = part_size
        self.requests: list[Request] = []
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[tuple[str, str], Repo] = {}  # by their earlier names
        self.collections: dict[str, list[tuple[str, str]]] = {}
        self._lock = threading.RLock()
        self._breaking: list[tuple[str, int]] = []
        self.faults = Faults()
        self.alterations: list[Callable[[Call, Reply], Reply]] = []  # of answers, as other Hubs would give them
        self._has_xet = xet

    def start(self) -> "LoopbackHub":
        self._server = Server(lambda call: self.faults.around(call, self._altered), self.requests, self.faults)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # stop() waits for one poll: with the default, every test would take half a second longer.
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.xet = xet.Storage(self) if self._has_xet else None
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self.xet:
            self.xet.stop()

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()

    def environ(self, home: str | os.PathLike[str], *, token: str | None = token) -> dict[str, str]:
        """The environment of a process that knows only this Hub, with all caches in `home`.

        Args:
            token: of the login; None for a process that is not logged in.
        """
        libraries = ("HF_", "HUGGING", "TRANSFORMERS_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(libraries)}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "0" if self._has_xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # else datasets and evaluate report each load to s3.amazonaws.com
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return inherited | settings | ({"HF_TOKEN": token} if token else {})

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        repo_type: str = "model",
        *,
        private: bool = False,
        gated: str | bool = False,
    ) -> str:
        """Create a repository of one commit, in any namespace, and return the commit's sha.

        Nobody can read the files of a gated one until `grant`.
        """
        if (repo_type, repo_id) in self.repos:
            raise ValueError(f"{repo_type} {repo_id} exists; use add_commit")
        repo = self.repos[repo_type, repo_id] = Repo(repo_id, repo_type, private, "auto" if gated is True else gated)
        return repo.commit("refs/heads/main", make_blobs(files), "initial commit").sha

    def add_commit(
        self, repo_id: str, files: Mapping[str, bytes | None], repo_type: str = "model", *, revision: str = "main"
    ) -> str:
        """Commit without any client and return the sha; None deletes a file."""
        repo = self.repos[repo_type, repo_id]
        before = repo.resolve(revision)
        unchanged = {path: blob for path, blob in before.files.items() if path not in files}
        new = make_blobs({path: data for path, data in files.items() if data is not None})
        return repo.commit(repo.branch(revision), unchanged | new, "update", parent=before.sha).sha

    def add_collection(self, slug: str, items: list[tuple[str, str]]) -> None:
        """Create a public collection of pairs of type ("model", "dataset", "paper", ...) and id."""
        self.collections[slug] = items

    def grant(self, repo_id: str, repo_type: str = "model") -> None:
        """Let the holder of the token read a gated repository."""
        self.repos[repo_type, repo_id].granted = True

    def files(self, repo_id: str, revision: str | None = None, repo_type: str = "model") -> dict[str, bytes]:
        commit = self.repos[repo_type, repo_id].resolve(revision or "main")
        return {path: blob.data for path, blob in commit.files.items()}

    def commits(self, repo_id: str, revision: str | None = None, repo_type: str = "model") -> list[Commit]:
        """The newest first. If a client made the repository, the last is an "initial commit" of a .gitattributes."""
        return list(self.repos[repo_type, repo_id].log(revision or "main"))

    def logged(self, method: str, fragment: str = "") -> list[Request]:
        """The lines of the access log with this method and this text in the path."""
        return [request for request in self.requests if request.method == method and fragment in request.path]

    def break_off(self, fragment: str, *, times: int, after: int = 1000) -> None:
        """Drop the connection in the middle of the next replies to GETs whose path has this fragment.

        Args:
            times: how often.
            after: so many bytes of the body; shorter replies are whole.
        """
        self._breaking += [(fragment, after)] * times

    def _altered(self, call: Call) -> Reply:
        reply = self.answer(call)
        for alteration in self.alterations:
            reply = alteration(call, reply)
        return reply

    def answer(self, call: Call) -> Reply:
        try:
            with self._lock:
                reply = self._dispatch(call)
                for fragment, after in self._breaking if call.method == "GET" else ():
                    if fragment in call.path and len(reply.body) > after:
                        self._breaking.remove((fragment, after))
                        reply.breaks_off_after = after
                        break
                return reply
        except HubError as error:
            return json_reply({"error": str(error)}, error.status, error.headers)
        except (KeyError, TypeError, ValueError) as error:
            # not 500, which the clients would retry for half a minute
            return json_reply({"error": f"{type(error).__name__}: {error}"}, 400)

    def _dispatch(self, call: Call) -> Reply:
        authorization = call.headers.get("Authorization")
        if authorization not in (None, f"Bearer {self.token}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        call.user = USER if authorization else None
        for methods, pattern, answer in (*routes, *repos.routes, *lfs.routes, *xet.routes, *discussions.routes):
            if call.method in methods and (match := pattern.fullmatch(call.path)):
                arguments: dict[str, Any] = {name: text and unquote(text) for name, text in match.groupdict().items()}
                if "kind" in arguments:
                    arguments["kind"] = (arguments["kind"] or "models").strip("/").removesuffix("s")
                if "id" in arguments:
                    arguments["repo"] = self._find(call, arguments.pop("kind"), arguments.pop("id"))
                return answer(self, call, **arguments)
        raise HubError(404, f"The loopback Hub has no {call.method} {call.path}")

    def _find(self, call: Call, repo_type: str, repo_id: str) -> Repo:
        moved = self.moved.get((repo_type, repo_id))
        if moved and (repo_type, repo_id) not in self.repos and moved.visible_to(call.user):
            path = call.path.replace(repo_id, moved.id, 1) + (
                f"?{urlencode(call.query, doseq=True)}" if call.query else ""
            )
            raise HubError(307, f"{repo_id} is {moved.id} now", Location=path)
        return self.visible(repo_type, repo_id, call.user)

    def visible(self, repo_type: str, repo_id: str, user: str | None) -> Repo:
        repo = self.repos.get((repo_type, repo_id))
        if repo is None or not repo.visible_to(user):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def require_write(self, call: Call, namespace: str | None = None) -> None:
        """Raises a HubError without a token or the right to the namespace, unless that is None."""
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        if namespace is not None and namespace not in NAMESPACES:
            raise HubError(403, f"You don't have the rights to write under the namespace {namespace}")

    def require_access(self, call: Call, repo: Repo) -> None:
        if repo.gated and not (call.user and repo.granted):
            message = f"Access to {repo.type} {repo.id} is restricted and you are not in the authorized list."
            raise HubError(403 if call.user else 401, message, "GatedRepo")

    def page(self, call: Call, items: list[Any]) -> Reply:
        start = int(call.option("cursor") or 0)
        end = start + min(int(call.option("limit") or self.page_size), self.page_size)
        following = urlencode({**call.query, "cursor": [str(end)]}, doseq=True)
        link = {"Link": f'<{self.url}{call.path}?{following}>; rel="next"'} if end < len(items) else {}
        return json_reply(items[start:end], headers=link)

    @routes.on("GET", "/api/whoami-v2")
    def _whoami(self, call: Call) -> Reply:
        self.require_write(call)
        orgs = [{"type": "org", "name": name, "roleInOrg": "admin"} for name in NAMESPACES if name != USER]
        access = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
        return json_reply({"type": "user", "name": USER, "fullname": USER, "orgs": orgs, "auth": access})

    @routes.on("POST", "/api/validate-yaml")
    def _validate_yaml(self, call: Call) -> Reply:
        content = call.json()["content"]
        if errors := problems(content):
            return json_reply({"errors": [{"message": error} for error in errors], "warnings": []}, 400)
        missing = [] if content.startswith("---") else [{"message": "empty or missing yaml metadata in repo card"}]
        return json_reply({"errors": [], "warnings": missing})

    @routes.on("GET", rf"/api/{KIND}")
    def _list(self, call: Call, kind: str) -> Reply:
        author, search = call.option("author"), (call.option("search") or "").lower()
        wanted = {*call.query.get("filter", ()), *call.query.get("pipeline_tag", ())}
        repos = [repo for repo in self.repos.values() if repo.type == kind and repo.visible_to(call.user)]
        repos = [repo for repo in repos if author in (None, repo.namespace) and search in repo.id.lower()]
        infos = [info for repo in repos if wanted <= {*(info := describe(repo, repo.resolve("main")))["tags"]}]
        if not call.flag("full"):
            extra = [name for name in ("cardData", "config") if call.flag(name)]
            fields = {"id", *call.query.get("expand", [*LISTED, *extra])}
            infos = [{name: info[name] for name in info.keys() & fields} for info in infos]
        return self.page(call, infos)

    @routes.on("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)")
    def _collection(self, call: Call, slug: str) -> Reply:
        """The items that exist and that the caller may see."""
        if slug not in self.collections:
            raise HubError(404, f"Collection not found: {slug}")
        visible = {place for place, repo in self.repos.items() if repo.visible_to(call.user)}
        items = [item for item in self.collections[slug] if item in visible or item[0] in ("paper", "collection")]
        return json_reply(describe_collection(slug, items))

    @routes.on("GET", rf"{API}(?:/revision/{REV})?")
    def _info(self, call: Call, repo: Repo, rev: str | None) -> Reply:
        commit = repo.resolve(rev or "main")
        info = describe(repo, commit)
        if call.flag("blobs"):
            info["siblings"] = siblings_with_sizes(commit.files)
        return json_reply({name: info[name] for name in info.keys() & {"id", *call.query.get("expand", info)}})

    @routes.on("GET", rf"{API}/tree/{REV}(?:/(?P<folder>.+))?")
    def _tree(self, call: Call, repo: Repo, rev: str, folder: str | None) -> Reply:
        commit = repo.resolve(rev)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        below = [entry for path, entry in tree_entries(commit.files).items() if path.startswith(prefix)]
        if folder and not below:
            raise HubError(404, f"{folder} does not exist on {rev}", "EntryNotFound", X_Repo_Commit=commit.sha)
        if not call.flag("recursive"):
            below = [entry for entry in below if "/" not in entry["path"][len(prefix) :]]
        return self.page(call, below)

    @routes.on("POST", rf"{API}/paths-info/{REV}")
    def _paths_info(self, call: Call, repo: Repo, rev: str) -> Reply:
        entries = tree_entries(repo.resolve(rev).files)
        paths = [path.strip("/") for path in parse_qs(call.body.decode()).get("paths", [])]
        return json_reply([entries[path] for path in paths if path in entries])

    @routes.on("GET", rf"{API}/commits/{REV}")
    def _commits(self, call: Call, repo: Repo, rev: str) -> Reply:
        commits = [
            {
                "id": commit.sha,
                "title": commit.title,
                "message": commit.description,
                "date": timestamp(commit.date),
                "authors": [{"user": USER}],
            }
            for commit in repo.log(rev)
        ]
        return self.page(call, commits)

    @routes.on("GET", rf"{API}/refs")
    def _refs(self, call: Call, repo: Repo) -> Reply:
        answer: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
        for ref, sha in repo.refs.items():
            _, folder, name = ref.split("/", 2)
            kind = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[folder]
            answer[kind].append({"name": name, "ref": ref, "targetCommit": sha})
        return json_reply(answer)

    @routes.on("POST", rf"{API}/(?P<what>branch|tag)/{REV}")
    def _create_ref(self, call: Call, repo: Repo, what: str, rev: str) -> Reply:
        """A branch's name is in the URL and its start in the body; with a tag it is the other way round."""
        self.require_write(call, repo.namespace)
        body = call.json() if call.body else {}
        name, start = (rev, body.get("startingPoint", "main")) if what == "branch" else (body["tag"], rev)
        ref = f"refs/{'heads' if what == 'branch' else 'tags'}/{name}"
        if ref in repo.refs:
            raise HubError(409, f"Reference already exists: {name}")
        repo.refs[ref] = repo.resolve(start).sha
        return json_reply({})

    @routes.on("POST", rf"{API}/preupload/{REV}")
    def _preupload(self, call: Call, repo: Repo, rev: str) -> Reply:
        self.require_write(call, None if call.flag("create_pr") else repo.namespace)
        present, answers = repo.resolve(rev).files, []
        for file in call.json()["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            mode = "lfs" if is_lfs(path, file["size"], sample) else "regular"
            oid = present[path].etag if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return json_reply({"files": answers})

    @routes.on("POST", rf"{API}/commit/{REV}")
    def _commit(self, call: Call, repo: Repo, rev: str) -> Reply:
        pull_request = call.flag("create_pr")
        self.require_write(call, None if pull_request else repo.namespace)
        header, *operations = [json.loads(line) for line in call.body.splitlines() if line.strip()]
        header = header["value"]
        base, expected = repo.resolve(rev), header.get("parentCommit") or ""
        if pull_request and expected:
            base = repo.resolve(expected)
        elif not base.sha.startswith(expected):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        number, branch = len(repo.pull_requests) + 1, repo.branch(rev)
        ref = f"refs/pr/{number}" if pull_request else branch
        files = apply_operations(repo, base.files, operations)
        commit = repo.commit(ref, files, header["summary"], header.get("description", ""), base.sha)
        if pull_request:
            repo.pull_requests[number] = PullRequest(number, branch, commit.title, commit.description, commit.date)
        page = self.url + repo.web_path
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}"}
        return json_reply(answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if pull_request else {}))

    @routes.on("GET HEAD", rf"{WEB}/resolve/{REV}/(?P<path>.+)")
    def _resolve(self, call: Call, repo: Repo, rev: str, path: str) -> Reply:
        commit = repo.resolve(rev)
        self.require_access(call, repo)
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, f"Entry not found: {path}", "EntryNotFound", X_Repo_Commit=commit.sha)
        size = len(blob.data)
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(size)} if blob.lfs else {}
        wanted = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", call.headers.get("Range") or "")
        if not wanted:
            return Reply(blob.data, 200, headers)
        start, end, suffix = (int(number) if number else None for number in wanted.groups())
        first = start if start is not None else max(size - (suffix or 0), 0)
        last = min(end if end is not None else size, size - 1)
        if first > last:
            raise HubError(416, "Requested range not satisfiable", Content_Range=f"bytes */{size}")
        return Reply(blob.data[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{size}"})

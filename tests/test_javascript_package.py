"""``npm install`` of this folder installs both modules, with types that ``tsc --strict`` accepts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

NPM = shutil.which("npm")
MODULES = ROOT / "node_modules"
if NPM is None:
    pytest.skip("npm is not installed (apt install npm)", allow_module_level=True)
if not (MODULES / "typescript").exists():
    pytest.skip("the packages of package.json are not installed (npm install)", allow_module_level=True)

TSC = MODULES / ".bin" / "tsc"

CONSUMER = """
import { ResumeStreamError, abortMessage, resumeStream, store, type Piece, type StreamItem } from "resume-stream";
import { useResumeStream, type MessageState } from "resume-stream/react";

const message = { baseUrl: new URL("http://127.0.0.1:8000"), threadId: "t", messageId: "m" };

export async function produce(tokens: AsyncIterable<string>, stream: ReadableStream<string>): Promise<number> {
  const pieces: Piece[] = ["one", { content: "two", event: "tool" }];
  await store({ ...message, source: pieces, maxPending: 10, maxPendingBytes: 1024, keepAlive: 0 });
  await store({ ...message, source: (signal) => (signal.aborted ? stream : tokens) });
  const { chunkCount } = await store({ ...message, source: tokens, onConnection: (event) => event.connected });
  return chunkCount;
}

export async function read(): Promise<string> {
  let text = "";
  try {
    for await (const item of resumeStream({ ...message, wait: true, token: async () => "x" })) text = added(text, item);
  } catch (error) {
    if (error instanceof ResumeStreamError && error.status === 404) await abortMessage({ ...message, reason: "x" });
  }
  return text;
}

function added(text: string, item: StreamItem): string {
  return item.type === "chunk" ? text + item.content : item.type === "reset" ? "" : text;
}

export function Answer({ messageId }: { messageId: string | null }): [string, MessageState["status"], () => unknown] {
  const { text, status, reason, error, stop } = useResumeStream({ threadId: "t", messageId, wait: true });
  return [`${text} ${reason ?? error}`, status, stop];
}

// @ts-expect-error a source gives texts
void store({ ...message, source: [1, 2] });
// @ts-expect-error a message has a thread
void resumeStream({ messageId: "m" });
// @ts-expect-error there is no such status
export const never = (state: MessageState) => state.status === "done";
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project that has installed the package as npm packs it."""
    folder = tmp_path_factory.mktemp("project")
    packed = subprocess.run(
        [NPM, "pack", "--silent", "--pack-destination", folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (folder / "package.json").write_text('{"type": "module"}')
    command = [NPM, "install", "--offline", "--no-audit", "--no-fund", "--silent", packed.stdout.strip()]
    subprocess.run(command, cwd=folder, check=True)
    return folder


def test_package_has_the_modules_their_types_and_nothing_else_of_the_project(project: Path) -> None:
    installed = project / "node_modules" / "resume-stream"
    modules = {f"static/{name}{end}" for name in ("resume-stream", "use-resume-stream") for end in (".js", ".d.ts")}
    files = {str(file.relative_to(installed)) for file in installed.rglob("*") if file.is_file()}
    assert files - {"LICENSE"} == modules | {"package.json", "README.md"}
    assert [folder.name for folder in (project / "node_modules").iterdir() if folder.name[0] != "."] == [
        "resume-stream"
    ]


def test_package_has_the_version_of_the_service() -> None:
    version = json.loads((ROOT / "package.json").read_text())["version"]
    assert re.search(r'^__version__ = "(.*)"$', (ROOT / "app.py").read_text(), re.MULTILINE)[1] == version


def test_node_imports_the_client_by_its_name(project: Path) -> None:
    code = 'import { store } from "resume-stream"; console.log(typeof store)'
    command = ["node", "--input-type=module", "--eval", code]
    assert subprocess.run(command, cwd=project, capture_output=True, check=True).stdout == b"function\n"


@pytest.mark.parametrize("resolution", ["bundler", "nodenext"])
def test_strict_consumer_compiles(project: Path, resolution: str) -> None:
    (project / "consumer.ts").write_text(CONSUMER)
    module = {"bundler": "esnext", "nodenext": "nodenext"}[resolution]
    command = [TSC, "--strict", "--noEmit", "--target", "es2022", "--module", module]
    command += ["--moduleResolution", resolution, "--types", "", "consumer.ts"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")

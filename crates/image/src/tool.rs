//! Running the host's tools.

use std::collections::VecDeque;
use std::path::Path;
use std::process::{Output, Stdio};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::process::{Child, Command};

use crate::ImageError;

/// Lines of a failed tool's output that are kept for the error.
const KEPT_LINES: usize = 8;
/// Longest line that is kept.
const KEPT_CHARS: usize = 300;

/// A program of the host and the Debian package that holds it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    pub(crate) package: &'static str,
}

const fn tool(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package }
}

pub(crate) const APT_GET: Tool = tool("apt-get", "apt");
pub(crate) const DPKG_DEB: Tool = tool("dpkg-deb", "dpkg");
pub(crate) const GCC: Tool = tool("gcc", "gcc");
pub(crate) const GCC_ARM64: Tool = tool("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu");
pub(crate) const MKE2FS: Tool = tool("mke2fs", "e2fsprogs");
pub(crate) const MMDEBSTRAP: Tool = tool("mmdebstrap", "mmdebstrap");
pub(crate) const XZ: Tool = tool("xz", "xz-utils");

impl Tool {
    /// A command for this tool with a neutral language. It leads a process group of its own.
    pub(crate) fn command(self) -> Command {
        let mut command = Command::new(self.program);
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("LC_ALL", "C")
            .env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin"))
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .process_group(0)
            .kill_on_drop(true);
        command
    }
}

/// Kills the whole group when a build is given up, so that no child of a tool outlives it.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

fn spawn(tool: Tool, command: &mut Command) -> Result<(Child, Group), ImageError> {
    let child = command.spawn().map_err(|source| {
        if source.kind() == std::io::ErrorKind::NotFound {
            ImageError::ToolMissing { tool: tool.program, package: tool.package }
        } else {
            ImageError::Io { doing: "starting", path: tool.program.into(), source }
        }
    })?;
    let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    Ok((child, Group(pid)))
}

/// Runs a tool to its end; its output goes line by line to `line`.
///
/// # Errors
/// [`ImageError::ToolMissing`], or [`ImageError::ToolFailed`] with its last lines.
pub(crate) async fn run(
    tool: Tool,
    command: &mut Command,
    doing: &str,
    mut line: impl FnMut(&str),
) -> Result<(), ImageError> {
    let (mut child, mut group) =
        spawn(tool, command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let mut out = lines_of(child.stdout.take());
    let mut err = lines_of(child.stderr.take());
    let mut kept = VecDeque::new();
    let (mut out_open, mut err_open) = (true, true);
    while out_open || err_open {
        let text = tokio::select! {
            text = next_line(&mut out), if out_open => { out_open = text.is_some(); text }
            text = next_line(&mut err), if err_open => { err_open = text.is_some(); text }
        };
        if let Some(text) = text {
            line(&text);
            if !text.trim().is_empty() {
                kept.push_back(text.chars().take(KEPT_CHARS).collect::<String>());
                if kept.len() > KEPT_LINES {
                    kept.pop_front();
                }
            }
        }
    }
    let status = child.wait().await.map_err(ImageError::io("waiting for", tool.program))?;
    group.0 = None;
    if status.success() {
        return Ok(());
    }
    Err(ImageError::ToolFailed {
        tool: tool.program.into(),
        doing: doing.into(),
        status: status.to_string(),
        stderr: Vec::from(kept).join(" | "),
    })
}

/// Runs a tool and returns what it wrote to its standard output.
pub(crate) async fn output(
    tool: Tool,
    command: &mut Command,
    doing: &str,
) -> Result<Output, ImageError> {
    let (child, mut group) = spawn(tool, command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let output =
        child.wait_with_output().await.map_err(ImageError::io("waiting for", tool.program))?;
    group.0 = None;
    if output.status.success() {
        return Ok(output);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = stderr.lines().filter(|l| !l.trim().is_empty()).collect();
    Err(ImageError::ToolFailed {
        tool: tool.program.into(),
        doing: doing.into(),
        status: output.status.to_string(),
        stderr: lines[lines.len().saturating_sub(KEPT_LINES)..].join(" | "),
    })
}

/// Decompresses an `.xz` file.
pub(crate) async fn xz_decompress(path: &Path) -> Result<Vec<u8>, ImageError> {
    let mut command = XZ.command();
    command.arg("-dc").arg("--").arg(path);
    Ok(output(XZ, &mut command, &format!("decompressing {}", path.display())).await?.stdout)
}

type Lines = Option<tokio::io::Split<BufReader<Box<dyn AsyncRead + Unpin + Send>>>>;

fn lines_of(stream: Option<impl AsyncRead + Unpin + Send + 'static>) -> Lines {
    stream.map(|s| BufReader::new(Box::new(s) as Box<dyn AsyncRead + Unpin + Send>).split(b'\n'))
}

async fn next_line(lines: &mut Lines) -> Option<String> {
    let bytes = lines.as_mut()?.next_segment().await.ok()??;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SH: Tool = tool("sh", "dash");
    const NONE: Tool = tool("godwit-no-such-tool", "no-such-package");

    #[tokio::test]
    async fn a_failure_carries_the_last_lines_of_its_tool() {
        let mut command = SH.command();
        command.args(["-c", "echo one; echo two >&2; exit 3"]);
        let mut seen = Vec::new();
        let e =
            run(SH, &mut command, "trying", |l| seen.push(l.to_owned())).await.expect_err("exit 3");
        seen.sort();
        assert_eq!(seen, ["one", "two"]);
        assert!(e.to_string().contains("two") && e.to_string().contains("trying"), "{e}");
    }

    #[tokio::test]
    async fn a_missing_tool_names_its_package() {
        let e = run(NONE, &mut NONE.command(), "trying", |_| {}).await.expect_err("missing");
        assert!(e.to_string().contains("apt-get install no-such-package"), "{e}");
    }

    #[tokio::test]
    async fn giving_up_kills_the_children_of_a_tool() {
        let dir = tempfile::tempdir().expect("temp dir");
        let pidfile = dir.path().join("pid");
        let mut command = SH.command();
        command
            .arg("-c")
            .arg(format!("sleep 600 & echo $! > {0}.new; mv {0}.new {0}; wait", pidfile.display()));
        {
            let running = run(SH, &mut command, "sleeping", |_| {});
            tokio::pin!(running);
            while !pidfile.exists() {
                tokio::select! {
                    _ = &mut running => panic!("it ended"),
                    () = tokio::time::sleep(std::time::Duration::from_millis(10)) => {}
                }
            }
        }
        let pid: i32 =
            std::fs::read_to_string(&pidfile).expect("pid").trim().parse().expect("a pid");
        let stat = format!("/proc/{pid}/stat");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        // Gone, or dead and not yet reaped by init.
        while std::fs::read_to_string(&stat).is_ok_and(|s| !s.contains(") Z")) {
            assert!(std::time::Instant::now() < deadline, "the child lives on");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}

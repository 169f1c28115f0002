//! Running `ip`, `nft` and `dnsmasq`.

use std::process::Stdio;
use std::time::Duration;

use godwit_types::{Code, CodedError};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// How long one of them may take.
const WITHIN: Duration = Duration::from_secs(20);

/// Why a network is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// What networks need is not on this host.
    #[error("networks cannot be made here: {0}")]
    Lacking(String),
    /// A program did not do its part.
    #[error("'{command}': {why}")]
    Command {
        /// The command.
        command: String,
        /// What it said.
        why: String,
    },
    /// A file or directory.
    #[error("{doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// No address is left for the way from a network to its host.
    #[error("all of {0} is in use on this host")]
    NoLink(&'static str),
}

impl CodedError for NetError {
    fn code(&self) -> Code {
        match self {
            Self::Lacking(_) => Code::Unavailable,
            Self::NoLink(_) => Code::NoRoom,
            Self::Command { .. } | Self::Io { .. } => Code::Internal,
        }
    }
}

impl NetError {
    pub(crate) fn io(
        doing: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self::Io { doing, path, source }
    }
}

/// Runs a program with `input`; gives what it prints.
pub(crate) async fn run(program: &[&str], input: &str) -> Result<String, NetError> {
    let command = || program.join(" ");
    let failed = |why: String| NetError::Command { command: command(), why };
    let [name, args @ ..] = program else { return Err(failed("no program".into())) };
    let mut child = Command::new(name)
        .args(args)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => NetError::Lacking(format!("no {name}")),
            _ => failed(e.to_string()),
        })?;
    let stdin = child.stdin.take();
    let ends = async {
        if let Some(mut stdin) = stdin {
            // One that does not read says why when it ends.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(WITHIN, ends)
        .await
        .map_err(|_| failed(format!("no end within {} s", WITHIN.as_secs())))?
        .map_err(|e| failed(e.to_string()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(failed(words.trim().chars().take(400).collect()))
}

/// Runs a program in a network namespace.
pub(crate) async fn run_in(
    namespace: &str,
    program: &[&str],
    input: &str,
) -> Result<String, NetError> {
    run(&[&["ip", "netns", "exec", namespace], program].concat(), input).await
}

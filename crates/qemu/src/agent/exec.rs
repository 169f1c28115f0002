//! Programs in a guest.
//!
//! The agent starts a program, keeps what it prints, and tells it once, when it is asked after the
//! program has ended. Between two such questions nobody holds the channel. A long input is put
//! into a file in the guest first, in pieces, for the same reason.

use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;
use uuid::Uuid;

use super::{Agent, AgentError, AgentSession};

/// How often a running program is asked whether it has ended: after an eighth of the time that it
/// has taken so far, within these bounds. Each question costs the guest some of that time.
const EXEC_LOOK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// How long the answer to one question may take: a whole output is in it, and who gives up too
/// early loses that.
const RESULT_WITHIN: Duration = Duration::from_secs(60);

/// The longest input that goes along with the question to start a program, in bytes.
const INLINE: usize = 512 << 10;
/// Bytes of a longer one that are written at once. An emulated guest takes in some 2 MiB/s.
const PIECE: usize = 192 << 10;
/// How long each of those may take.
const PIECE_WITHIN: Duration = Duration::from_secs(30);
/// Makes the file `$0` for an input: what is in it is nobody else's business.
const MAKE: &str = "umask 077 && : >\"$0\"";
/// Starts a program with the file `$0` as its input; the file is gone once it is open.
const FEED: &str = "exec <\"$0\" && rm -f \"$0\" && exec \"$@\"";

/// A program to be started in a guest.
#[derive(Debug, Clone, Copy, Default)]
pub struct GuestCommand<'a> {
    /// Its path.
    pub path: &'a str,
    /// Its arguments.
    pub args: &'a [&'a str],
    /// Its environment, `NAME=value`; the agent's own when empty.
    pub env: &'a [String],
    /// Its standard input.
    pub input: &'a [u8],
}

/// What a program in the guest did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    /// Exit status; `None` when a signal ended it.
    pub exit: Option<i64>,
    /// The signal that ended it.
    pub signal: Option<i64>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Whether the agent cut one of them.
    pub truncated: bool,
}

impl ExecOutput {
    /// Most bytes of each output that are kept: as many as the agent keeps.
    pub const MAX_BYTES: usize = 16 << 20;

    /// Standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Whether the program ended with status 0.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.exit == Some(0)
    }

    fn of(status: Status) -> Option<Self> {
        let mut truncated = status.out_truncated || status.err_truncated;
        let mut bytes = |text: Option<String>| match text {
            None => Some(Vec::new()),
            Some(text) => BASE64_STANDARD.decode(text).ok().map(|mut b| {
                truncated |= b.len() > Self::MAX_BYTES;
                b.truncate(Self::MAX_BYTES);
                b
            }),
        };
        let (stdout, stderr) = (bytes(status.out_data)?, bytes(status.err_data)?);
        Some(Self { exit: status.exitcode, signal: status.signal, stdout, stderr, truncated })
    }
}

/// The agent's answer about a program. What else is in it takes no memory.
#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Status {
    exited: bool,
    exitcode: Option<i64>,
    signal: Option<i64>,
    out_data: Option<String>,
    err_data: Option<String>,
    out_truncated: bool,
    err_truncated: bool,
}

#[derive(Deserialize)]
struct StatusAnswer {
    #[serde(rename = "return")]
    done: Option<Status>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

impl Agent {
    /// Executes the program at `path` in the guest with `args`, environment `env` (`NAME=value`)
    /// and standard input `input`, and waits until it has ended. Meanwhile others may ask the
    /// agent.
    ///
    /// # Errors
    /// A program that cannot be started, or does not end within `within` (it runs on then).
    pub async fn exec(
        &self,
        path: &str,
        args: &[&str],
        env: &[String],
        input: &[u8],
        within: Duration,
    ) -> Result<ExecOutput, AgentError> {
        let until = Instant::now() + within;
        let pid = self.start(GuestCommand { path, args, env, input }, within).await?;
        let left = until.saturating_duration_since(Instant::now());
        let ended = self.wait(pid, left).await?;
        ended.ok_or_else(|| AgentError::RunsOn { path: path.to_owned(), pid, within })
    }

    /// Starts a program in the guest and gives its process there. Its output is kept for
    /// [`Agent::wait`].
    ///
    /// # Errors
    /// [`AgentError::Unsure`] when the agent was asked and did not answer; after any other, the
    /// program was not started. `within` is the time for the agent's first answer.
    pub async fn start(
        &self,
        program: GuestCommand<'_>,
        within: Duration,
    ) -> Result<u64, AgentError> {
        if program.input.len() <= INLINE {
            return self.start_inline(program, within).await;
        }
        let until = Instant::now() + within;
        let file = format!("/run/godwit-input-{}", Uuid::new_v4().simple());
        self.put(&file, program.input, within).await?;
        let args: Vec<&str> = ["-c", FEED, &file, program.path]
            .into_iter()
            .chain(program.args.iter().copied())
            .collect();
        let fed = GuestCommand { path: "/bin/sh", args: &args, input: &[], ..program };
        let left = until.saturating_duration_since(Instant::now()).max(PIECE_WITHIN);
        self.start_inline(fed, left).await
    }

    async fn start_inline(
        &self,
        program: GuestCommand<'_>,
        within: Duration,
    ) -> Result<u64, AgentError> {
        let mut session = self.connect("guest-exec", within).await?;
        let answer = tokio::time::timeout(RESULT_WITHIN, session.start(program)).await;
        let answer = answer.unwrap_or_else(|_| {
            Err(AgentError::TimedOut { command: "guest-exec".into(), within: RESULT_WITHIN })
        });
        answer.map_err(|e| match e {
            e @ AgentError::Refused { .. } => e,
            source => AgentError::Unsure { path: program.path.to_owned(), source: source.into() },
        })
    }

    /// Writes a file in the guest that only its root may read. The channel is free between two
    /// pieces.
    async fn put(&self, file: &str, bytes: &[u8], within: Duration) -> Result<(), AgentError> {
        let made = self.exec_inline("/bin/sh", &["-c", MAKE, file], within).await?;
        if !made.ok() {
            return Err(AgentError::Answer {
                command: format!("making {file}"),
                why: "the guest has no room or no shell for a long input",
            });
        }
        let open = json!({ "path": file, "mode": "r+" });
        let handle = self.ask("guest-file-open", open, PIECE_WITHIN).await?;
        let written = async {
            for piece in bytes.chunks(PIECE) {
                let piece = json!({ "handle": handle, "buf-b64": BASE64_STANDARD.encode(piece) });
                let _ = self.ask("guest-file-write", piece, PIECE_WITHIN).await?;
            }
            Ok(())
        };
        let written = written.await;
        let closed = self.ask("guest-file-close", json!({ "handle": handle }), PIECE_WITHIN).await;
        let done = written.and(closed.map(drop));
        if done.is_err() {
            // The failure itself is told; what is left is removed if the guest still can.
            let _ = self.exec_inline("/bin/rm", &["-f", file], PIECE_WITHIN).await;
        }
        done
    }

    async fn exec_inline(
        &self,
        path: &str,
        args: &[&str],
        within: Duration,
    ) -> Result<ExecOutput, AgentError> {
        let program = GuestCommand { path, args, ..GuestCommand::default() };
        let pid = self.start_inline(program, within).await?;
        let ended = self.wait(pid, within).await?;
        ended.ok_or_else(|| AgentError::RunsOn { path: path.to_owned(), pid, within })
    }

    /// Waits until the program that [`Agent::start`] gave has ended, and gives what it did; `None`
    /// when it still runs after `within`. The agent tells it once.
    ///
    /// # Errors
    /// The channel's, and [`AgentError::Refused`] when the agent does not know the program.
    pub async fn wait(&self, pid: u64, within: Duration) -> Result<Option<ExecOutput>, AgentError> {
        let began = Instant::now();
        loop {
            let asked = async { self.session("guest-exec-status").await?.status(pid).await };
            let ended = tokio::time::timeout(RESULT_WITHIN, asked).await.unwrap_or_else(|_| {
                let command = "guest-exec-status".to_owned();
                Err(AgentError::TimedOut { command, within: RESULT_WITHIN })
            })?;
            let left = within.saturating_sub(began.elapsed());
            if ended.is_some() || left.is_zero() {
                return Ok(ended);
            }
            let look = (began.elapsed() / 8).clamp(EXEC_LOOK.0, EXEC_LOOK.1);
            tokio::time::sleep(look.min(left)).await;
        }
    }
}

impl AgentSession<'_> {
    /// As [`Agent::exec`], with the channel held meanwhile: nobody else may ask.
    ///
    /// # Errors
    /// As [`Agent::exec`].
    pub async fn exec(
        &mut self,
        path: &str,
        args: &[&str],
        env: &[String],
        input: &[u8],
        within: Duration,
    ) -> Result<ExecOutput, AgentError> {
        let run = async {
            let pid = self.start(GuestCommand { path, args, env, input }).await?;
            let began = Instant::now();
            loop {
                if let Some(ended) = self.status(pid).await? {
                    return Ok(ended);
                }
                let look = (began.elapsed() / 8).clamp(EXEC_LOOK.0, EXEC_LOOK.1);
                tokio::time::sleep(look).await;
            }
        };
        match tokio::time::timeout(within, run).await {
            Ok(done) => done,
            Err(_) => Err(AgentError::TimedOut { command: format!("guest-exec {path}"), within }),
        }
    }

    async fn start(&mut self, program: GuestCommand<'_>) -> Result<u64, AgentError> {
        let GuestCommand { path, args, env, input } = program;
        let mut wanted = json!({ "path": path, "arg": args, "capture-output": true });
        if !env.is_empty() {
            wanted["env"] = json!(env);
        }
        if !input.is_empty() {
            wanted["input-data"] = Value::from(BASE64_STANDARD.encode(input));
        }
        let started = self.ask("guest-exec", &wanted).await?;
        started["pid"].as_u64().ok_or_else(|| AgentError::Answer {
            command: format!("guest-exec {path}"),
            why: "no pid",
        })
    }

    /// What the program did; `None` while it runs.
    async fn status(&mut self, pid: u64) -> Result<Option<ExecOutput>, AgentError> {
        const COMMAND: &str = "guest-exec-status";
        let bad = |why| AgentError::Answer { command: COMMAND.to_owned(), why };
        let line = self.exchange(COMMAND, &json!({ "pid": pid })).await?;
        let answer: StatusAnswer =
            serde_json::from_slice(&line).map_err(|_| bad("it is no status of a program"))?;
        if let Some(refusal) = answer.error {
            return Err(super::refused(COMMAND, &refusal.desc));
        }
        let status = answer.done.ok_or_else(|| bad("it has no return value"))?;
        if !status.exited {
            return Ok(None);
        }
        ExecOutput::of(status).map(Some).ok_or_else(|| bad("output that is not base64"))
    }
}

//! The guest agent: qemu-guest-agent over a virtio-serial port.
//!
//! ```text
//!  flush:  0xff  guest-sync-delimited(id)  --->  guest
//!          ... again with a new id while nobody answers ...
//!          ... whatever was left over ...  <---
//!          0xff  {"return": newest id}     <---      only now is the channel in step
//!  ask:    {"execute": ...}                --->
//!          {"return": ...}                 <---
//! ```
//!
//! The connection is kept between sessions: while nobody is connected the agent only looks every
//! 100 ms whether somebody is, which the first question would wait for. After a restore the guest
//! may still answer a question of before the save, so every session begins with the flush. The
//! agent answers the mark itself with a parse error; it comes before the answer to the flush, so
//! nothing is left over once the newest one is answered. What the guest says is hostile: lines and
//! outputs have bounds.

use std::path::PathBuf;
use std::time::Duration;

use godwit_types::{Code, CodedError};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::Instant;

/// Longest line taken from a guest, in bytes: the agent's own limit for captured output (16 MiB)
/// in base64 would not fit, and is cut by [`ExecOutput::MAX_BYTES`] long before.
const MAX_LINE: usize = 8 << 20;
/// How often a running program is asked whether it has ended: after an eighth of the time that it
/// has taken so far, within these bounds. Each question costs the guest some of that time.
const EXEC_LOOK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// How often the flush is sent again while nobody answers: a guest that boots drops the first.
const FLUSH_AGAIN: Duration = Duration::from_millis(500);
/// The same once an earlier flush was answered: the guest is there, only slow.
const FLUSH_SLOW: Duration = Duration::from_secs(10);
/// How soon a command that is not answered when it is obeyed would be refused.
const REFUSED_WITHIN: Duration = Duration::from_secs(2);
/// Room for one read, in bytes.
const READ: usize = 16 << 10;
/// The agent's frame mark: never part of UTF-8.
const MARK: u8 = 0xff;

/// Why the guest agent did not do it.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The channel.
    #[error("the guest agent's channel failed during '{command}'")]
    Io {
        /// The command.
        command: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Nobody answered.
    #[error("the guest agent did not answer '{command}' within {within:?}")]
    TimedOut {
        /// The command.
        command: String,
        /// The time it had.
        within: Duration,
    },
    /// The agent refused.
    #[error("the guest agent refused '{command}': {desc}")]
    Refused {
        /// The command.
        command: String,
        /// Its words, cut to 300 characters.
        desc: String,
    },
    /// Something that is no answer.
    #[error("the guest agent's answer to '{command}' cannot be used: {why}")]
    Answer {
        /// The command.
        command: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

impl CodedError for AgentError {
    fn code(&self) -> Code {
        match self {
            Self::Io { .. } => Code::Unavailable,
            Self::TimedOut { .. } => Code::TimedOut,
            Self::Refused { .. } => Code::Conflict,
            Self::Answer { .. } => Code::Damaged,
        }
    }
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
    /// Most bytes of each output that are kept.
    pub const MAX_BYTES: usize = 2 << 20;

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
}

/// The agent of one machine. One session at a time: one question, or one program from its start to
/// its end.
#[derive(Debug)]
pub struct Agent {
    socket: PathBuf,
    one: tokio::sync::Mutex<Channel>,
}

/// What outlives a session.
#[derive(Debug)]
struct Channel {
    last_id: u64,
    wire: Option<Wire>,
}

#[derive(Debug)]
struct Wire {
    stream: UnixStream,
    frames: Frames,
}

impl Agent {
    pub(crate) fn new(socket: PathBuf) -> Self {
        // Ids of this process and of an earlier daemon must not meet.
        let seed = u64::from(std::process::id()) << 20;
        Self { socket, one: tokio::sync::Mutex::new(Channel { last_id: seed, wire: None }) }
    }

    /// The socket has another name from now on; a connection stays.
    pub(crate) fn moved(&mut self, socket: PathBuf) {
        self.socket = socket;
    }

    /// Connects, unless that is done, and asks nothing. A machine that was saved with somebody
    /// connected finds itself so again when this comes before its state is loaded.
    ///
    /// # Errors
    /// [`AgentError::Io`] when QEMU does not have the channel.
    pub async fn attach(&self) -> Result<(), AgentError> {
        let mut channel = self.one.lock().await;
        if channel.wire.is_none() {
            channel.wire = Some(self.wire("attach").await?);
        }
        Ok(())
    }

    async fn wire(&self, command: &str) -> Result<Wire, AgentError> {
        let io = |source| AgentError::Io { command: command.to_owned(), source };
        let stream = UnixStream::connect(&self.socket).await.map_err(io)?;
        Ok(Wire { stream, frames: Frames::default() })
    }

    /// Waits until the agent answers.
    ///
    /// # Errors
    /// [`AgentError::TimedOut`] after `within`.
    pub async fn ping(&self, within: Duration) -> Result<(), AgentError> {
        self.ask("guest-ping", Value::Null, within).await.map(drop)
    }

    /// Executes the program at `path` in the guest with `args`, environment `env` (`NAME=value`)
    /// and standard input `input`, and waits until it has ended.
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
        let mut session = self.connect("guest-exec", within).await?;
        session.exec(path, args, env, input, until.saturating_duration_since(Instant::now())).await
    }

    /// Waits until the agent answers, and stays in step with it for what is to be done first
    /// then: a question of its own costs an emulated guest tens of milliseconds. `command` names
    /// what it is for.
    ///
    /// # Errors
    /// [`AgentError::TimedOut`] after `within`.
    pub async fn connect(
        &self,
        command: &str,
        within: Duration,
    ) -> Result<AgentSession<'_>, AgentError> {
        match tokio::time::timeout(within, self.session(command)).await {
            Ok(session) => session,
            Err(_) => Err(AgentError::TimedOut { command: command.to_owned(), within }),
        }
    }

    /// Freezes the guest's file systems; gives how many.
    ///
    /// # Errors
    /// As [`Agent::ask`]. The caller thaws in every case.
    pub async fn freeze(&self, within: Duration) -> Result<u64, AgentError> {
        let n = self.ask("guest-fsfreeze-freeze", Value::Null, within).await?;
        Ok(n.as_u64().unwrap_or(0))
    }

    /// Thaws the guest's file systems; gives how many.
    ///
    /// # Errors
    /// As [`Agent::ask`].
    pub async fn thaw(&self, within: Duration) -> Result<u64, AgentError> {
        let n = self.ask("guest-fsfreeze-thaw", Value::Null, within).await?;
        Ok(n.as_u64().unwrap_or(0))
    }

    /// Asks the guest to power itself off. It does that in its own time; see
    /// [`Machine::wait_life`](crate::Machine::wait_life).
    ///
    /// # Errors
    /// As [`Agent::ask`].
    pub async fn power_off(&self, within: Duration) -> Result<(), AgentError> {
        const COMMAND: &str = "guest-shutdown";
        let late = |_| AgentError::TimedOut { command: COMMAND.to_owned(), within };
        let asked = async {
            let mut session = self.session(COMMAND).await?;
            let how = json!({ "mode": "powerdown" });
            // A refusal is answered, obedience is not.
            match tokio::time::timeout(REFUSED_WITHIN, session.ask(COMMAND, &how)).await {
                Ok(Err(e @ AgentError::Refused { .. })) => Err(e),
                _ => Ok(()),
            }
        };
        tokio::time::timeout(within, asked).await.map_err(late)?
    }

    /// Takes vCPUs `1..total` of the guest online, or offline.
    ///
    /// # Errors
    /// As [`Agent::ask`], and a guest that changed only some.
    pub async fn set_vcpus(
        &self,
        total: u8,
        online: Vcpus,
        within: Duration,
    ) -> Result<(), AgentError> {
        let vcpus: Vec<Value> = (1..total)
            .map(|n| json!({ "logical-id": n, "online": online == Vcpus::Online }))
            .collect();
        if vcpus.is_empty() {
            return Ok(());
        }
        let done = self.ask("guest-set-vcpus", json!({ "vcpus": vcpus }), within).await?;
        if done.as_u64() == Some(u64::from(total) - 1) {
            return Ok(());
        }
        Err(AgentError::Answer {
            command: "guest-set-vcpus".into(),
            why: "the guest changed only some of its vCPUs",
        })
    }

    /// Executes one agent command, in step with the guest.
    ///
    /// # Errors
    /// No answer within `within`, a refusal, or an answer that is none.
    pub async fn ask(
        &self,
        command: &str,
        arguments: Value,
        within: Duration,
    ) -> Result<Value, AgentError> {
        let exchange = async { self.session(command).await?.ask(command, &arguments).await };
        match tokio::time::timeout(within, exchange).await {
            Ok(done) => done,
            Err(_) => Err(AgentError::TimedOut { command: command.to_owned(), within }),
        }
    }

    /// Brings the channel in step with the guest, for `command`.
    async fn session(&self, command: &str) -> Result<AgentSession<'_>, AgentError> {
        let io = |source| AgentError::Io { command: command.to_owned(), source };
        let mut session = AgentSession { channel: self.one.lock().await };
        if session.channel.wire.is_some() && session.flush().await.is_ok() {
            return Ok(session);
        }
        // There was no connection, or QEMU has closed it.
        session.channel.wire = Some(self.wire(command).await?);
        session.flush().await.map_err(io)?;
        Ok(session)
    }
}

/// A connection in step with the guest. Nobody else has one while it lasts.
#[derive(Debug)]
pub struct AgentSession<'a> {
    channel: tokio::sync::MutexGuard<'a, Channel>,
}

impl AgentSession<'_> {
    /// As [`Agent::exec`].
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
        let mut wanted = json!({ "path": path, "arg": args, "capture-output": true });
        if !env.is_empty() {
            wanted["env"] = json!(env);
        }
        if !input.is_empty() {
            wanted["input-data"] = Value::from(base64::encode(input));
        }
        let command = format!("guest-exec {path}");
        let bad = |why| AgentError::Answer { command: command.clone(), why };
        let run = async {
            let started = self.ask("guest-exec", &wanted).await?;
            let pid = started["pid"].as_u64().ok_or_else(|| bad("no pid"))?;
            let began = Instant::now();
            loop {
                let status = self.ask("guest-exec-status", &json!({ "pid": pid })).await?;
                if status["exited"] == true {
                    return output(&status).ok_or_else(|| bad("output that is not base64"));
                }
                let look = (began.elapsed() / 8).clamp(EXEC_LOOK.0, EXEC_LOOK.1);
                tokio::time::sleep(look).await;
            }
        };
        match tokio::time::timeout(within, run).await {
            Ok(done) => done,
            Err(_) => Err(AgentError::TimedOut { command, within }),
        }
    }

    async fn flush(&mut self) -> std::io::Result<()> {
        let Channel { last_id, wire } = &mut *self.channel;
        let Wire { stream, frames } = wire.as_mut().ok_or(std::io::ErrorKind::NotConnected)?;
        let first = *last_id + 1;
        let mut patience = FLUSH_AGAIN;
        loop {
            *last_id += 1;
            let newest = *last_id;
            let sync = json!({ "execute": "guest-sync-delimited", "arguments": { "id": newest } });
            let mut flush = vec![MARK];
            flush.extend_from_slice(sync.to_string().as_bytes());
            flush.push(b'\n');
            stream.write_all(&flush).await?;
            let mut again = Instant::now() + patience;
            loop {
                let next = next_line(stream, frames);
                let Ok(line) = tokio::time::timeout_at(again, next).await else { break };
                match sync_answer(&line?) {
                    Some(id) if id == newest => return Ok(()),
                    Some(id) if (first..newest).contains(&id) => {
                        // The newest is on its way to the guest and will not be dropped.
                        patience = FLUSH_SLOW;
                        again = Instant::now() + patience;
                    }
                    _ => {}
                }
            }
        }
    }

    async fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value, AgentError> {
        let io = |source| AgentError::Io { command: command.to_owned(), source };
        let bad = |why| AgentError::Answer { command: command.to_owned(), why };
        let mut ask = json!({ "execute": command });
        if !arguments.is_null() {
            ask["arguments"] = arguments.clone();
        }
        let mut line = ask.to_string().into_bytes();
        line.push(b'\n');
        let wire = self.channel.wire.as_mut();
        let Wire { stream, frames } =
            wire.ok_or_else(|| io(std::io::ErrorKind::NotConnected.into()))?;
        stream.write_all(&line).await.map_err(io)?;
        let line = next_line(stream, frames).await.map_err(io)?;
        let answer: Value = serde_json::from_slice(&line).map_err(|_| bad("it is not JSON"))?;
        if let Some(desc) = answer["error"]["desc"].as_str() {
            let desc = desc.chars().filter(|c| !c.is_control()).take(300).collect();
            return Err(AgentError::Refused { command: command.to_owned(), desc });
        }
        answer.get("return").cloned().ok_or_else(|| bad("it has no return value"))
    }
}

/// Whether vCPUs are to be used by the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vcpus {
    /// In use.
    Online,
    /// Taken out.
    Offline,
}

/// Bytes from the guest, cut into lines.
#[derive(Debug, Default)]
struct Frames {
    buf: Vec<u8>,
    scanned: usize,
}

impl Frames {
    fn next(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        let end = self.buf[self.scanned..].iter().position(|&b| b == b'\n');
        match end.map(|at| at + self.scanned) {
            Some(at) => {
                let mut line: Vec<u8> = self.buf.drain(..=at).collect();
                self.scanned = 0;
                line.pop();
                Ok(Some(line))
            }
            None if self.buf.len() > MAX_LINE => Err(std::io::Error::new(
                std::io::ErrorKind::InvalidData,
                "the guest sends a line without end",
            )),
            None => {
                self.scanned = self.buf.len();
                Ok(None)
            }
        }
    }
}

/// The next line; nothing is lost when it is given up and called again.
async fn next_line(stream: &mut UnixStream, frames: &mut Frames) -> std::io::Result<Vec<u8>> {
    loop {
        if let Some(line) = frames.next()? {
            return Ok(line);
        }
        frames.buf.reserve(READ);
        if stream.read_buf(&mut frames.buf).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// The id that `line` answers, if it is the marked answer to a flush.
fn sync_answer(line: &[u8]) -> Option<u64> {
    let mark = line.iter().rposition(|&b| b == MARK)?;
    serde_json::from_slice::<Value>(&line[mark + 1..]).ok()?["return"].as_u64()
}

fn output(status: &Value) -> Option<ExecOutput> {
    let bytes = |key: &str| match status[key].as_str() {
        None => Some(Vec::new()),
        Some(text) => base64::decode(text).map(|mut b| {
            b.truncate(ExecOutput::MAX_BYTES);
            b
        }),
    };
    Some(ExecOutput {
        exit: status["exitcode"].as_i64(),
        signal: status["signal"].as_i64(),
        stdout: bytes("out-data")?,
        stderr: bytes("err-data")?,
        truncated: status["out-truncated"] == true || status["err-truncated"] == true,
    })
}

/// RFC 4648, section 4.
mod base64 {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

    pub(super) fn encode(data: &[u8]) -> String {
        let mut out = String::with_capacity(data.len().div_ceil(3) * 4);
        for part in data.chunks(3) {
            let n = part.iter().fold(0u32, |n, &b| n << 8 | u32::from(b)) << (8 * (3 - part.len()));
            for digit in 0..4 {
                out.push(match digit <= part.len() {
                    true => char::from(DIGITS[(n >> (18 - 6 * digit) & 63) as usize]),
                    false => '=',
                });
            }
        }
        out
    }

    pub(super) fn decode(text: &str) -> Option<Vec<u8>> {
        let digits = text.trim_end_matches('=').as_bytes();
        if !text.len().is_multiple_of(4) || text.len() - digits.len() > 2 {
            return None;
        }
        let mut out = Vec::with_capacity(digits.len() / 4 * 3 + 2);
        for part in digits.chunks(4) {
            let mut n = 0u32;
            for &d in part {
                n = n << 6 | u32::try_from(DIGITS.iter().position(|&x| x == d)?).ok()?;
            }
            n <<= 6 * (4 - part.len());
            out.extend_from_slice(&n.to_be_bytes()[1..part.len()]);
        }
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::net::UnixListener;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (plain, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64::encode(plain.as_bytes()), text);
            assert_eq!(base64::decode(text).unwrap(), plain.as_bytes());
        }
        for bad in ["Z", "Zg=", "Z===", "Zm9v!", "====", "Zm 9"] {
            assert_eq!(base64::decode(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn base64_round_trips(data in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert_eq!(base64::decode(&base64::encode(&data)).unwrap(), data);
        }

        #[test]
        fn hostile_lines_are_no_sync_answers(line in proptest::collection::vec(any::<u8>(), 0..60)) {
            prop_assert_eq!(sync_answer(&line), None);
        }
    }

    /// The id of the next flush that the host sends.
    async fn flushed(stream: &mut UnixStream, frames: &mut Frames) -> u64 {
        let line = next_line(stream, frames).await.unwrap();
        assert_eq!(line[0], MARK);
        let sync: Value = serde_json::from_slice(&line[1..]).unwrap();
        sync["arguments"]["id"].as_u64().unwrap()
    }

    /// What the agent says to a flush.
    fn answer(id: u64) -> Vec<u8> {
        let mut reply = b"{\"error\": {\"desc\": \"JSON parse error, stray\"}}\n".to_vec();
        reply.push(MARK);
        reply.extend_from_slice(format!("{{\"return\": {id}}}\n").as_bytes());
        reply
    }

    async fn asked(stream: &mut UnixStream, frames: &mut Frames) {
        let ask = next_line(stream, frames).await.unwrap();
        let ask: Value = serde_json::from_slice(&ask).unwrap();
        assert_eq!(ask["execute"], "guest-fsfreeze-freeze");
        stream.write_all(b"{\"return\": 3}\n").await.unwrap();
    }

    #[tokio::test]
    async fn stale_answers_are_flushed_before_the_question() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut frames = Frames::default();
            stream.write_all(b"{\"return\": \"stale\"}\n{\"ret").await.unwrap();
            let id = flushed(&mut stream, &mut frames).await;
            stream.write_all(b"urn\": 1}\n").await.unwrap();
            // An answer to a flush of an earlier session.
            stream.write_all(&answer(id - 1)).await.unwrap();
            stream.write_all(&answer(id)).await.unwrap();
            asked(&mut stream, &mut frames).await;
        });
        let agent = Agent::new(path);
        assert_eq!(agent.freeze(Duration::from_secs(20)).await.unwrap(), 3);
        guest.await.unwrap();
    }

    #[tokio::test]
    async fn a_slow_guest_that_answers_every_flush_is_asked_after_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut frames = Frames::default();
            let mut ids = Vec::new();
            for _ in 0..3 {
                ids.push(flushed(&mut stream, &mut frames).await);
            }
            ids.dedup();
            assert_eq!(ids.len(), 3, "an id is used once");
            for id in ids {
                stream.write_all(&answer(id)).await.unwrap();
            }
            asked(&mut stream, &mut frames).await;
        });
        let agent = Agent::new(path);
        assert_eq!(agent.freeze(Duration::from_secs(20)).await.unwrap(), 3);
        guest.await.unwrap();
    }

    #[tokio::test]
    async fn a_guest_without_an_agent_is_a_time_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let _listener = UnixListener::bind(&path).unwrap();
        let err = Agent::new(path).ping(Duration::from_millis(100)).await.expect_err("silent");
        assert_eq!(err.code(), Code::TimedOut);
    }
}

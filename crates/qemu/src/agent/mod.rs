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
//! nothing is left over once the newest one is answered. A question right behind an answer needs no
//! flush: nothing can be left over then. What the guest says is hostile: lines and outputs have
//! bounds.

mod exec;
mod frames;
mod renew;

use std::path::PathBuf;
use std::time::Duration;

use godwit_types::{Code, CodedError};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::time::Instant;

pub use exec::{ExecOutput, GuestCommand};
use frames::{Frames, next_line};

/// How often the flush is sent again while nobody answers: a guest that boots drops the first.
const FLUSH_AGAIN: Duration = Duration::from_millis(500);
/// The same once an earlier flush was answered: the guest is there, only slow.
const FLUSH_SLOW: Duration = Duration::from_secs(10);
/// For how long after its last answer a guest is taken to be in step: the next question needs no
/// flush then. A guest that boots again takes longer than that.
const IN_STEP_FOR: Duration = Duration::from_millis(500);
/// How soon a command that is not answered when it is obeyed would be refused.
const REFUSED_WITHIN: Duration = Duration::from_secs(2);
/// Longest answer to a question other than for a program's output, in bytes.
const MAX_ANSWER: usize = 256 << 10;
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
    /// The agent was asked to start a program, and then nothing more was heard.
    #[error("it is not known whether '{path}' was started in the guest")]
    Unsure {
        /// The program.
        path: String,
        /// What came instead of an answer.
        #[source]
        source: Box<AgentError>,
    },
    /// A program has not ended in its time.
    #[error("'{path}' has not ended within {within:?}; it still runs in the guest (pid {pid})")]
    RunsOn {
        /// The program.
        path: String,
        /// Its process in the guest.
        pid: u64,
        /// The time it had.
        within: Duration,
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
            Self::TimedOut { .. } | Self::RunsOn { .. } => Code::TimedOut,
            Self::Unsure { .. } => Code::Internal,
            Self::Refused { .. } => Code::Conflict,
            Self::Answer { .. } => Code::Damaged,
        }
    }
}

/// The agent of one machine. One session at a time: one question, or one of the programs of docking
/// and activating from its start to its end. While [`Agent::exec`] waits for a program, others may
/// ask.
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
    /// When the guest last answered; `None` while something may be left over.
    in_step: Option<Instant>,
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
        Self {
            socket,
            one: tokio::sync::Mutex::new(Channel { last_id: seed, wire: None, in_step: None }),
        }
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

    /// Waits until the agent answers now, however recently it did, and stays in step with it for
    /// what is to be done first then: a question of its own costs an emulated guest tens of
    /// milliseconds. `command` names what it is for.
    ///
    /// # Errors
    /// [`AgentError::TimedOut`] after `within`.
    pub async fn connect(
        &self,
        command: &str,
        within: Duration,
    ) -> Result<AgentSession<'_>, AgentError> {
        let answered = async { self.flushed(self.one.lock().await, command).await };
        match tokio::time::timeout(within, answered).await {
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
        let channel = self.one.lock().await;
        if channel.in_step.is_some_and(|at| at.elapsed() < IN_STEP_FOR) {
            return Ok(AgentSession { channel });
        }
        self.flushed(channel, command).await
    }

    /// As [`Agent::session`], by an answer of the guest's.
    async fn flushed<'a>(
        &self,
        channel: tokio::sync::MutexGuard<'a, Channel>,
        command: &str,
    ) -> Result<AgentSession<'a>, AgentError> {
        let io = |source| AgentError::Io { command: command.to_owned(), source };
        let mut session = AgentSession { channel };
        session.channel.in_step = None;
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
    async fn flush(&mut self) -> std::io::Result<()> {
        let Channel { last_id, wire, in_step } = &mut *self.channel;
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
                    Some(id) if id == newest => {
                        *in_step = Some(Instant::now());
                        return Ok(());
                    }
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
        let bad = |why| AgentError::Answer { command: command.to_owned(), why };
        let line = self.exchange(command, arguments).await?;
        // What a guest sends takes many times its length once it is parsed.
        if line.len() > MAX_ANSWER {
            return Err(bad("it is too long"));
        }
        let answer: Value = serde_json::from_slice(&line).map_err(|_| bad("it is not JSON"))?;
        if let Some(desc) = answer["error"]["desc"].as_str() {
            return Err(refused(command, desc));
        }
        answer.get("return").cloned().ok_or_else(|| bad("it has no return value"))
    }

    /// Asks, and gives the line that came.
    async fn exchange(&mut self, command: &str, arguments: &Value) -> Result<Vec<u8>, AgentError> {
        let io = |source| AgentError::Io { command: command.to_owned(), source };
        let mut ask = json!({ "execute": command });
        if !arguments.is_null() {
            ask["arguments"] = arguments.clone();
        }
        let mut line = ask.to_string().into_bytes();
        line.push(b'\n');
        let Channel { wire, in_step, .. } = &mut *self.channel;
        let Wire { stream, frames } =
            wire.as_mut().ok_or_else(|| io(std::io::ErrorKind::NotConnected.into()))?;
        *in_step = None;
        stream.write_all(&line).await.map_err(io)?;
        let line = next_line(stream, frames).await.map_err(io)?;
        *in_step = Some(Instant::now());
        Ok(line)
    }
}

fn refused(command: &str, desc: &str) -> AgentError {
    let desc = desc.chars().filter(|c| !c.is_control()).take(300).collect();
    AgentError::Refused { command: command.to_owned(), desc }
}

/// Whether vCPUs are to be used by the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vcpus {
    /// In use.
    Online,
    /// Taken out.
    Offline,
}

/// The id that `line` answers, if it is the marked answer to a flush.
fn sync_answer(line: &[u8]) -> Option<u64> {
    let mark = line.iter().rposition(|&b| b == MARK)?;
    serde_json::from_slice::<Value>(&line[mark + 1..]).ok()?["return"].as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::net::UnixListener;

    proptest! {
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

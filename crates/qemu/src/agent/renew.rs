//! The question that wakes a docked machine.
//!
//! ```text
//!  \n {"execute":"godwit-activate","arguments":{"id":7,"set":"NAME=value .."}} \n   --->  guest
//!     ... whatever was left over ...                                                <---
//!     0xff {"return":7}     done     0xff {"error":{"desc":".."},"id":7}     not    <---
//!     {"error":{"class":"CommandNotFound",..}}     an agent that does not know it   <---
//! ```
//!
//! A process that was there when the machine was docked answers it, in front of qemu-ga: an
//! emulated guest would spend most of its activation on qemu-ga's fork and exec. The line begins
//! anew, so that it is read whatever came before it; the id says which answer is meant, and that
//! process does nothing twice for one id.

use std::time::Duration;

use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;
use uuid::Uuid;

use super::frames::next_line;
use super::{Agent, AgentError, AgentSession, Channel, MARK, refused, sync_answer};

/// The question.
const COMMAND: &str = "godwit-activate";
/// How often it is asked again while nobody answers.
const AGAIN: Duration = Duration::from_secs(5);

/// What an agent says that did not do it.
#[derive(Deserialize)]
struct Failure {
    error: ErrorBody,
    id: Option<u64>,
}

#[derive(Deserialize)]
struct ErrorBody {
    #[serde(default)]
    class: String,
    #[serde(default)]
    desc: String,
}

/// What a line means.
#[derive(Debug, PartialEq, Eq)]
enum LineMeaning {
    Done,
    Failed(String),
    Unknown,
    Nothing,
}

/// An id that no question ever had: a machine may be docked again, and remembers the last one.
fn unique() -> u64 {
    u64::try_from(Uuid::new_v4().as_u128() >> 65).unwrap_or(1)
}

fn meaning_of(line: &[u8], id: u64) -> LineMeaning {
    let mark = line.iter().rposition(|&b| b == MARK);
    let failure = serde_json::from_slice::<Failure>(&line[mark.map_or(0, |at| at + 1)..]);
    match (mark, failure) {
        (Some(_), _) if sync_answer(line) == Some(id) => LineMeaning::Done,
        (Some(_), Ok(failure)) if failure.id == Some(id) => LineMeaning::Failed(failure.error.desc),
        (None, Ok(failure)) if failure.error.class == "CommandNotFound" => LineMeaning::Unknown,
        _ => LineMeaning::Nothing,
    }
}

impl Agent {
    /// Has the guest renew what makes it itself and let its user programs go on, as `set`
    /// (`NAME=value` without blanks and quotes) says. Gives a session when its agent does not know
    /// how: a program has to be started for it then.
    ///
    /// # Errors
    /// No answer within `within`, or a guest that could not.
    pub async fn renew(
        &self,
        set: &[String],
        within: Duration,
    ) -> Result<Option<AgentSession<'_>>, AgentError> {
        let asked = async {
            let mut session = AgentSession { channel: self.one.lock().await };
            if session.channel.wire.is_none() {
                session.channel.wire = Some(self.wire(COMMAND).await?);
            }
            match session.renew(set).await? {
                true => Ok(None),
                false => Ok(Some(session)),
            }
        };
        tokio::time::timeout(within, asked)
            .await
            .unwrap_or_else(|_| Err(AgentError::TimedOut { command: COMMAND.to_owned(), within }))
    }
}

impl AgentSession<'_> {
    /// Whether the agent did it; if not, the channel is in step for another question.
    async fn renew(&mut self, set: &[String]) -> Result<bool, AgentError> {
        let io = |source| AgentError::Io { command: COMMAND.to_owned(), source };
        let Channel { wire, in_step, .. } = &mut *self.channel;
        let wire = wire.as_mut().ok_or_else(|| io(std::io::ErrorKind::NotConnected.into()))?;
        *in_step = None;
        let id = unique();
        // As the guest reads it: without a blank, the id first.
        let line = format!(
            "\n{{\"execute\":\"{COMMAND}\",\"arguments\":{{\"id\":{id},\"set\":\"{}\"}}}}\n",
            set.join(" ")
        );
        let mut asked = 0;
        loop {
            wire.stream.write_all(line.as_bytes()).await.map_err(io)?;
            asked += 1;
            let again = Instant::now() + AGAIN;
            loop {
                let next = next_line(&mut wire.stream, &mut wire.frames);
                let Ok(line) = tokio::time::timeout_at(again, next).await else { break };
                match meaning_of(&line.map_err(io)?, id) {
                    LineMeaning::Nothing => {}
                    LineMeaning::Done => {
                        *in_step = (asked == 1).then(Instant::now);
                        return Ok(true);
                    }
                    LineMeaning::Failed(why) => return Err(refused(COMMAND, &why)),
                    LineMeaning::Unknown if asked == 1 => {
                        *in_step = Some(Instant::now());
                        return Ok(false);
                    }
                    LineMeaning::Unknown => {
                        self.flush().await.map_err(io)?;
                        return Ok(false);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::frames::Frames;
    use super::*;
    use tokio::net::{UnixListener, UnixStream};

    const WITHIN: Duration = Duration::from_secs(20);

    async fn guest(
        says: impl FnOnce(u64) -> Vec<u8> + Send + 'static,
    ) -> (Agent, tokio::task::JoinHandle<UnixStream>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut frames = Frames::default();
            stream.write_all(b"{\"return\": \"stale\"}\n{\"ret").await.unwrap();
            assert_eq!(next_line(&mut stream, &mut frames).await.unwrap(), b"");
            let line = next_line(&mut stream, &mut frames).await.unwrap();
            let asked: serde_json::Value = serde_json::from_slice(&line).unwrap();
            assert_eq!(asked["arguments"]["set"], "A=1 B=2");
            let id = asked["arguments"]["id"].as_u64().unwrap();
            let begin = format!("{{\"execute\":\"godwit-activate\",\"arguments\":{{\"id\":{id},");
            assert!(line.starts_with(begin.as_bytes()), "as the guest's program reads it");
            stream.write_all(&says(id)).await.unwrap();
            stream
        });
        (Agent::new(path), guest, dir)
    }

    fn set() -> Vec<String> {
        vec!["A=1".into(), "B=2".into()]
    }

    #[tokio::test]
    async fn only_the_answer_to_this_question_counts() {
        let says = |id| {
            let mut all = b"urn\": 1}\n".to_vec();
            for (id, end) in [(id - 1, "\n"), (id, "\n")] {
                all.push(MARK);
                all.extend_from_slice(format!("{{\"return\":{id}}}{end}").as_bytes());
            }
            all
        };
        let (agent, guest, _dir) = guest(says).await;
        assert!(agent.renew(&set(), WITHIN).await.unwrap().is_none());
        let _stream = guest.await.unwrap();
        assert!(agent.one.lock().await.in_step.is_some());
    }

    #[tokio::test]
    async fn a_guest_that_could_not_says_why() {
        let says = |id| {
            let mut all = b"\n".to_vec();
            all.push(MARK);
            let why = format!("{{\"error\":{{\"desc\":\"no thaw\"}},\"id\":{id}}}\n");
            all.extend_from_slice(why.as_bytes());
            all
        };
        let (agent, guest, _dir) = guest(says).await;
        let failed = agent.renew(&set(), WITHIN).await.expect_err("it could not");
        assert!(failed.to_string().contains("no thaw"), "{failed}");
        drop(guest.await.unwrap());
    }

    #[tokio::test]
    async fn an_agent_that_does_not_know_it_is_asked_otherwise() {
        let says = |_| {
            b"\n{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"The command godwit-activate \
              has not been found\"}}\n"
                .to_vec()
        };
        let (agent, guest, _dir) = guest(says).await;
        let session = agent.renew(&set(), WITHIN).await.unwrap();
        assert!(session.is_some_and(|s| s.channel.in_step.is_some()));
        drop(guest.await.unwrap());
    }

    #[test]
    fn no_two_questions_have_one_id() {
        let ids: std::collections::HashSet<u64> = (0..1000).map(|_| unique()).collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|id| i64::try_from(*id).is_ok()), "JSON of C has signed numbers");
    }

    #[test]
    fn an_answer_to_another_question_is_nothing() {
        let marked = |text: &str| [&[MARK][..], text.as_bytes()].concat();
        let failed = "{\"error\":{\"desc\":\"no thaw\"},\"id\":7}";
        assert_eq!(meaning_of(&marked(failed), 7), LineMeaning::Failed("no thaw".into()));
        assert_eq!(meaning_of(&marked(failed), 8), LineMeaning::Nothing);
        assert_eq!(meaning_of(failed.as_bytes(), 7), LineMeaning::Nothing);
        assert_eq!(
            meaning_of(b"{\"error\":{\"class\":\"GenericError\"}}", 7),
            LineMeaning::Nothing
        );
        assert_eq!(meaning_of(b"", 7), LineMeaning::Nothing);
    }
}

//! The line protocol: framing with a bound, and the four kinds of message.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};

/// Longest line taken from QEMU, in bytes.
pub const MAX_LINE: usize = 4 << 20;

/// Room made for one read, in bytes.
const READ: usize = 16 << 10;

/// What is wrong with the bytes that came.
#[derive(Debug, thiserror::Error)]
pub enum ProtoError {
    /// A line without end.
    #[error("a line of more than {MAX_LINE} bytes")]
    TooLong,
    /// Not a JSON object.
    #[error("a line that is not a JSON object")]
    Json(#[source] serde_json::Error),
    /// An object of no known kind.
    #[error("a message of no known kind")]
    Unknown,
}

/// Collects bytes into lines.
#[derive(Debug, Default)]
pub struct Lines {
    buf: Vec<u8>,
    scanned: usize,
}

impl Lines {
    /// Takes bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    /// Where bytes are appended as they come, with room for some.
    pub fn room(&mut self) -> &mut Vec<u8> {
        self.buf.reserve(READ);
        &mut self.buf
    }

    /// The next whole line without its end, if there is one.
    ///
    /// # Errors
    /// [`ProtoError::TooLong`] when more than [`MAX_LINE`] bytes came without an end of line.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, ProtoError> {
        let end = self.buf[self.scanned..].iter().position(|&b| b == b'\n');
        match end.map(|at| at + self.scanned) {
            Some(at) if at > MAX_LINE => Err(ProtoError::TooLong),
            Some(at) => {
                let mut line: Vec<u8> = self.buf.drain(..=at).collect();
                self.scanned = 0;
                line.truncate(at);
                Ok(Some(line))
            }
            None if self.buf.len() > MAX_LINE => Err(ProtoError::TooLong),
            None => {
                self.scanned = self.buf.len();
                Ok(None)
            }
        }
    }
}

/// One message from QEMU.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The first line.
    Greeting {
        /// QEMU's version, `major.minor.micro`.
        version: String,
        /// Whether out-of-band execution may be switched on.
        oob: bool,
    },
    /// The answer to a command that was done.
    Return {
        /// The command's id.
        id: Option<u64>,
        /// What it returned.
        value: Value,
    },
    /// The answer to a command that was not.
    Error {
        /// The command's id.
        id: Option<u64>,
        /// QEMU's error class.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// Something happened.
    Event {
        /// Its name, such as `STOP`.
        name: String,
        /// Its data; null when it has none.
        data: Value,
        /// QEMU's own time stamp, since the Unix epoch.
        at: Duration,
    },
}

#[derive(Deserialize)]
struct RawError {
    class: String,
    desc: String,
}

#[derive(Deserialize)]
struct Stamp {
    seconds: i64,
    microseconds: i64,
}

impl Message {
    /// Reads one line.
    ///
    /// # Errors
    /// A line that is not a QMP message.
    pub fn parse(line: &[u8]) -> Result<Self, ProtoError> {
        let mut object: Map<String, Value> =
            serde_json::from_slice(line).map_err(ProtoError::Json)?;
        let id = object.get("id").and_then(Value::as_u64);
        if let Some(greeting) = object.get("QMP") {
            let n = |key: &str| greeting["version"]["qemu"][key].as_u64().unwrap_or(0);
            let oob = greeting["capabilities"]
                .as_array()
                .is_some_and(|caps| caps.iter().any(|c| c == "oob"));
            let version = format!("{}.{}.{}", n("major"), n("minor"), n("micro"));
            return Ok(Self::Greeting { version, oob });
        }
        if let Some(value) = object.remove("return") {
            return Ok(Self::Return { id, value });
        }
        if let Some(error) = object.remove("error") {
            let e: RawError = serde_json::from_value(error).map_err(ProtoError::Json)?;
            return Ok(Self::Error { id, class: e.class, desc: e.desc });
        }
        if let Some(Value::String(name)) = object.remove("event") {
            let stamp = object.remove("timestamp").unwrap_or_default();
            let at = serde_json::from_value::<Stamp>(stamp).map_or(Duration::ZERO, |s| {
                let micros = s.seconds.saturating_mul(1_000_000).saturating_add(s.microseconds);
                Duration::from_micros(u64::try_from(micros).unwrap_or(0))
            });
            return Ok(Self::Event {
                name,
                data: object.remove("data").unwrap_or(Value::Null),
                at,
            });
        }
        Err(ProtoError::Unknown)
    }
}

/// The line that asks QEMU to execute `command`; `oob` runs it out of band.
#[must_use]
pub fn request(id: u64, command: &str, arguments: &Value, oob: bool) -> Vec<u8> {
    let verb = if oob { "exec-oob" } else { "execute" };
    let mut object = Map::new();
    object.insert(verb.to_owned(), Value::from(command));
    if !arguments.is_null() {
        object.insert("arguments".to_owned(), arguments.clone());
    }
    object.insert("id".to_owned(), Value::from(id));
    let mut line = Value::Object(object).to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn each_kind_of_message_is_recognised() {
        let greeting = br#"{"QMP":{"version":{"qemu":{"micro":2,"minor":0,"major":10},"package":""},"capabilities":["oob"]}}"#;
        assert_eq!(
            Message::parse(greeting).unwrap(),
            Message::Greeting { version: "10.0.2".into(), oob: true }
        );
        assert_eq!(
            Message::parse(br#"{"return":{},"id":7}"#).unwrap(),
            Message::Return { id: Some(7), value: json!({}) }
        );
        assert_eq!(
            Message::parse(br#"{"id":1,"error":{"class":"GenericError","desc":"no"}}"#).unwrap(),
            Message::Error { id: Some(1), class: "GenericError".into(), desc: "no".into() }
        );
        let stop = br#"{"timestamp":{"seconds":3,"microseconds":5},"event":"STOP"}"#;
        assert_eq!(
            Message::parse(stop).unwrap(),
            Message::Event {
                name: "STOP".into(),
                data: Value::Null,
                at: Duration::from_micros(3_000_005)
            }
        );
        assert!(matches!(Message::parse(b"{}"), Err(ProtoError::Unknown)));
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut lines = Lines::default();
        lines.push(&vec![b'x'; MAX_LINE + 1]);
        assert!(matches!(lines.next_line(), Err(ProtoError::TooLong)));
    }

    proptest! {
        #[test]
        fn lines_come_out_however_they_are_cut(
            text in proptest::collection::vec("[a-z\\r ]{0,20}", 0..8), cut in 1usize..7
        ) {
            let bytes: Vec<u8> = text.iter().flat_map(|l| format!("{l}\n").into_bytes()).collect();
            let mut lines = Lines::default();
            let mut got = Vec::new();
            for part in bytes.chunks(cut) {
                lines.push(part);
                while let Some(line) = lines.next_line().unwrap() {
                    got.push(String::from_utf8(line).unwrap());
                }
            }
            prop_assert_eq!(got, text);
        }

        #[test]
        fn hostile_lines_are_errors_never_panics(s in "\\PC{0,80}") {
            let _ = Message::parse(s.as_bytes());
        }
    }
}

//! `--watch`: a list that is kept up to date by the center's events.
//!
//! On a terminal the table is drawn anew; elsewhere each change is a line, or with `-o json` the
//! event. The list says with which event it was made, and what comes after that is followed; so
//! nothing is missed in between, nor when the center is started again.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use futures::StreamExt;
use godwit_cloud::api::{FeedEvent, RESET};
use godwit_cloud::registry::EventKind;
use reqwest::Method;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::args::ClientArgs;
use crate::client::Client;
use crate::failure::{Failure, Outcome, Result};
use crate::interrupt::Interrupt;
use crate::out::{self, Format, Row};

/// The longest event that is read, in bytes.
const MAX_EVENT: usize = 8 << 20;

/// A stream that says nothing for so long is opened anew: the center says at least every 15 s that it
/// is there.
const QUIET: Duration = Duration::from_secs(45);

/// How often a table on a terminal is drawn anew without an event: ages grow.
const REDRAWN: Duration = Duration::from_secs(5);

/// The pauses between two tries to reach the center: the first, and the longest.
const AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// What can be watched.
pub(crate) trait Watch: Row + Sized {
    /// The kind of its events.
    const KIND: EventKind;
    /// Whether it has figures of which there are no events.
    const MOVES: bool = false;
    /// What the API has of it.
    type Record: DeserializeOwned;
    /// A row of that.
    fn of(record: Self::Record) -> Self;
    /// What its events call it.
    fn key(&self) -> String;
}

/// What is watched.
pub(crate) struct Watched<'a, T> {
    /// The list, as a path of the API.
    pub(crate) list: &'a str,
    /// The key of the one object that is watched.
    pub(crate) only: Option<String>,
    /// Which objects of the list are shown.
    pub(crate) keep: Box<dyn Fn(&T) -> bool + Send>,
}

/// Shows a list and what becomes of it, until it is interrupted or nobody reads any more; one object
/// until it is gone.
pub(crate) async fn watch<T: Watch>(client_args: &ClientArgs, what: Watched<'_, T>) -> Result {
    let mut interrupt = Interrupt::listen()?;
    let mut view = View {
        client_args,
        client: Client::open(&client_args.connect)?,
        what,
        shown: Shown::new(client_args.output),
        rows: BTreeMap::new(),
        last: String::new(),
    };
    tokio::select! {
        done = view.run() => done.or_else(|end| match end {
            End::NothingMore => Ok(Outcome::Done),
            End::Failed(f) => Err(f),
        }),
        () = interrupt.pressed() => Ok(Outcome::Done),
    }
}

/// Why watching ends.
#[derive(Debug)]
enum End {
    /// Nobody reads, or there is nothing left to tell.
    NothingMore,
    Failed(Failure),
}

impl From<Failure> for End {
    fn from(f: Failure) -> Self {
        Self::Failed(f)
    }
}

struct View<'a, T> {
    client_args: &'a ClientArgs,
    client: Client,
    what: Watched<'a, T>,
    shown: Shown,
    rows: BTreeMap<String, T>,
    /// The last event that the rows show.
    last: String,
}

impl<T: Watch> View<'_, T> {
    async fn run(&mut self) -> Result<Outcome, End> {
        self.list().await?;
        let mut pause = AGAIN.0;
        let mut reported = false;
        loop {
            let last = self.last.clone();
            match self.follow().await {
                Ok(()) => {}
                Err(End::Failed(f)) if f.away => {
                    if !std::mem::replace(&mut reported, true) {
                        out::notice("the center does not answer; going on when it does");
                    }
                }
                Err(end) => return Err(end),
            }
            if self.last != last {
                (pause, reported) = (AGAIN.0, false);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(AGAIN.1);
            // One that was started again may have another address.
            if let Ok(client) = Client::open(&self.client_args.connect) {
                self.client = client;
            }
        }
    }

    /// Lists anew and tells the difference.
    async fn list(&mut self) -> Result<(), End> {
        let (all, id): (Vec<T::Record>, _) = self.client.get_as_of(self.what.list).await?;
        self.last = id;
        let rows = all.into_iter().map(T::of).filter(|r| (self.what.keep)(r));
        let rows: BTreeMap<_, _> = rows.map(|r| (r.key(), r)).collect();
        let gone: Vec<_> = self.rows.keys().filter(|k| !rows.contains_key(*k)).cloned().collect();
        for key in gone {
            let listed = json!({ "id": self.last, "kind": T::KIND, "key": key, "deleted": true });
            self.drop_row(&key, &listed)?;
        }
        let mut rows: Vec<_> = rows.into_values().collect();
        rows.sort_by_key(Row::name);
        for row in rows {
            let listed = json!({
                "id": self.last, "kind": T::KIND, "key": row.key(), "name": row.name(),
                "deleted": false, "record": row,
            });
            self.set_row(row, &listed)?;
        }
        self.draw()
    }

    fn set_row(&mut self, row: T, event: &Value) -> Result<(), End> {
        let key = row.key();
        let same = self.rows.get(&key).is_some_and(|old| lasting(old) == lasting(&row));
        match &mut self.shown {
            Shown::Json => line(&event.to_string())?,
            Shown::Yaml => yaml(event)?,
            Shown::Names if !same => line(&row.name())?,
            Shown::Lines(lines) if !same => line(&lines.row(&row))?,
            _ => {}
        }
        self.rows.insert(key, row);
        Ok(())
    }

    fn drop_row(&mut self, key: &str, event: &Value) -> Result<(), End> {
        let Some(row) = self.rows.remove(key) else { return Ok(()) };
        match &mut self.shown {
            Shown::Json => line(&event.to_string())?,
            Shown::Yaml => yaml(event)?,
            Shown::Names => {}
            // It is gone, or none of those that are shown any more.
            Shown::Lines(_) => line(&format!("{}   gone", row.name()))?,
            Shown::Screen(_) => {}
        }
        Ok(())
    }

    fn draw(&self) -> Result<(), End> {
        match self.shown {
            Shown::Screen(format) => {
                let mut rows: Vec<_> = self.rows.values().collect();
                rows.sort_by_key(|r| r.name());
                write(screen(&out::table(format, rows.into_iter()), size()).as_bytes())
            }
            _ => Ok(()),
        }
    }

    /// Follows the events until the stream breaks off.
    async fn follow(&mut self) -> Result<(), End> {
        let name = self.what.only.as_ref().map(|n| format!("&name={n}")).unwrap_or_default();
        let path = format!("/v1/events?kind={}{name}", T::KIND.word());
        let request = self.client.request(Method::GET, &path).header("Last-Event-ID", &self.last);
        let answer = self.client.send(request).await?;
        let mut stream = answer.bytes_stream();
        let mut messages = Messages::default();
        let mut redraw = tokio::time::interval(REDRAWN);
        let mut quiet = Instant::now() + QUIET;
        loop {
            tokio::select! {
                part = tokio::time::timeout_at(quiet, stream.next()) => {
                    let Ok(Some(part)) = part else { return Ok(()) };
                    quiet = Instant::now() + QUIET;
                    let part = part.map_err(|e| self.client.broken(&e))?;
                    let mut some = false;
                    for message in messages.feed(&part)? {
                        some |= self.take(message).await?;
                    }
                    if some {
                        self.draw()?;
                    }
                }
                _ = redraw.tick(), if matches!(self.shown, Shown::Screen(_)) => {
                    if T::MOVES {
                        // It is drawn with what is known when the center does not answer.
                        let _ = self.list().await;
                    }
                    self.draw()?;
                }
            }
        }
    }

    /// Takes one message; answers whether it was an event.
    async fn take(&mut self, message: Message) -> Result<bool, End> {
        if message.event.is_empty() || message.data.is_empty() {
            self.last = message.id.unwrap_or_else(|| self.last.clone());
            return Ok(false);
        }
        let unexpected = |e: serde_json::Error| {
            Failure::internal(format!("an event of the center is not understood: {e}"))
                .hint("center and command should be of one version")
        };
        let data: Value = serde_json::from_slice(&message.data).map_err(unexpected)?;
        if message.event == RESET {
            match self.shown {
                Shown::Json => line(&json!({ "kind": RESET, "id": data["id"] }).to_string())?,
                Shown::Yaml => yaml(&json!({ "kind": RESET, "id": data["id"] }))?,
                _ => {}
            }
            self.list().await?;
        } else {
            self.event(data).map_err(|e| match e {
                EventError::Json(e) => End::from(unexpected(e)),
                EventError::End(end) => end,
            })?;
        }
        self.last = message.id.unwrap_or_else(|| self.last.clone());
        Ok(true)
    }

    fn event(&mut self, data: Value) -> Result<(), EventError> {
        let event: FeedEvent = serde_json::from_value(data.clone())?;
        if event.deleted {
            self.drop_row(&event.key, &data)?;
            if self.what.only.is_some() {
                return Err(End::NothingMore.into());
            }
        } else if let Some(record) = event.record {
            let row = T::of(serde_json::from_value(record)?);
            if (self.what.keep)(&row) {
                self.set_row(row, &data)?;
            } else {
                self.drop_row(&event.key, &data)?;
            }
        } else if self.rows.contains_key(&event.key) {
            // An older state of one that a later event shows.
            match self.shown {
                Shown::Json => line(&data.to_string())?,
                Shown::Yaml => yaml(&data)?,
                _ => {}
            }
        }
        Ok(())
    }
}

/// Why an event was not taken in.
enum EventError {
    Json(serde_json::Error),
    End(End),
}

impl From<serde_json::Error> for EventError {
    fn from(e: serde_json::Error) -> Self {
        Self::Json(e)
    }
}

impl From<End> for EventError {
    fn from(e: End) -> Self {
        Self::End(e)
    }
}

/// What is shown of a row, without what changes by itself.
fn lasting<T: Row>(row: &T) -> Vec<String> {
    let cells = T::COLUMNS.iter().zip(row.cells());
    cells.filter(|(c, _)| **c != "AGE").map(|(_, text)| text).collect()
}

/// How changes are shown.
enum Shown {
    /// A table that is drawn anew.
    Screen(Format),
    Lines(Lines),
    Names,
    Json,
    Yaml,
}

impl Shown {
    fn new(format: Format) -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|t| t == "dumb");
        match format {
            Format::Table | Format::Wide if io::stdout().is_terminal() && !dumb => {
                Self::Screen(format)
            }
            Format::Table | Format::Wide => {
                Self::Lines(Lines { wide: format == Format::Wide, widths: Vec::new() })
            }
            Format::Name => Self::Names,
            Format::Json => Self::Json,
            Format::Yaml => Self::Yaml,
        }
    }
}

/// Lines of a table whose end is not known.
struct Lines {
    wide: bool,
    /// Of each column, as far as lines have come.
    widths: Vec<usize>,
}

impl Lines {
    /// A row; the first comes below the titles.
    fn row<T: Row>(&mut self, row: &T) -> String {
        let columns = if self.wide { T::COLUMNS.len() } else { T::WIDE };
        let cells: Vec<_> = row.cells().iter().take(columns).map(|c| out::cell(c)).collect();
        let titles: Vec<String> = T::COLUMNS[..columns].iter().map(ToString::to_string).collect();
        let first = self.widths.is_empty();
        if first {
            self.widths = titles.iter().map(String::len).collect();
        }
        for (w, c) in self.widths.iter_mut().zip(&cells) {
            *w = (*w).max(c.chars().count());
        }
        let text = |cells: &[String]| {
            let padded = cells.iter().zip(&self.widths).map(|(c, w)| format!("{c:w$}   "));
            padded.collect::<String>().trim_end().to_owned()
        };
        if first { format!("{}\n{}", text(&titles), text(&cells)) } else { text(&cells) }
    }
}

/// Columns and lines of the terminal.
fn size() -> (usize, usize) {
    match rustix::termios::tcgetwinsize(io::stdout()) {
        Ok(s) if s.ws_col > 0 && s.ws_row > 1 => (s.ws_col.into(), s.ws_row.into()),
        _ => (80, 24),
    }
}

/// What draws a table in place of what there was: never wider or longer than the terminal, or it would
/// move on.
fn screen(table: &str, (columns, lines): (usize, usize)) -> String {
    let all: Vec<&str> = table.lines().collect();
    let room = lines.saturating_sub(1).max(1);
    let kept = if all.len() > room { room - 1 } else { all.len() };
    let mut text = String::from("\x1b[H");
    for l in &all[..kept] {
        text.extend(l.chars().take(columns));
        text.push_str("\x1b[K\r\n");
    }
    if kept < all.len() {
        text.push_str(&format!("and {} more\x1b[K\r\n", all.len() - kept));
    }
    text.push_str("\x1b[J");
    text
}

fn line(text: &str) -> Result<(), End> {
    write(format!("{text}\n").as_bytes())
}

fn yaml(data: &Value) -> Result<(), End> {
    let text = serde_yaml_ng::to_string(data)
        .map_err(|e| Failure::internal(format!("writing an event: {e}")))?;
    write(format!("---\n{text}").as_bytes())
}

/// Writes to stdout; whoever has stopped reading wants no more.
fn write(data: &[u8]) -> Result<(), End> {
    let mut out = io::stdout().lock();
    out.write_all(data).and_then(|()| out.flush()).map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe => End::NothingMore,
        _ => Failure::internal(format!("writing the answer: {e}")).into(),
    })
}

/// One server-sent message.
#[derive(Debug, Default, PartialEq, Eq)]
struct Message {
    id: Option<String>,
    event: String,
    data: Vec<u8>,
}

/// Server-sent messages, as they arrive in parts.
#[derive(Debug, Default)]
struct Messages {
    rest: Vec<u8>,
    begun: Message,
}

impl Messages {
    fn feed(&mut self, part: &[u8]) -> Result<Vec<Message>> {
        self.rest.extend_from_slice(part);
        let mut out = Vec::new();
        let mut read = 0;
        while let Some(end) = self.rest[read..].iter().position(|b| *b == b'\n') {
            let line = self.rest[read..read + end].trim_ascii_end();
            read += end + 1;
            if line.is_empty() {
                out.push(std::mem::take(&mut self.begun));
            } else if let Some(data) = line.strip_prefix(b"data:") {
                self.begun.data.extend_from_slice(data.trim_ascii_start());
            } else if let Some(id) = line.strip_prefix(b"id:") {
                let id = String::from_utf8_lossy(id.trim_ascii_start());
                self.begun.id = Some(id.into_owned());
            } else if let Some(event) = line.strip_prefix(b"event:") {
                self.begun.event = String::from_utf8_lossy(event.trim_ascii_start()).into_owned();
            }
        }
        self.rest.drain(..read);
        if self.rest.len() + self.begun.data.len() > MAX_EVENT {
            return Err(Failure::internal("an event of the center is too long"));
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Serialize)]
    struct Bird(&'static str, &'static str);
    impl Row for Bird {
        const COLUMNS: &'static [&'static str] = &["NAME", "SAYS", "AGE"];
        const WIDE: usize = 2;
        fn cells(&self) -> Vec<String> {
            vec![self.0.into(), self.1.into(), "3d".into()]
        }
        fn name(&self) -> String {
            self.0.into()
        }
    }

    #[test]
    fn messages_are_found_however_they_are_cut() {
        let text =
            b"id: 1-1\n\nid: 1-2\nevent: vm\ndata: {\"a\":\"id: 7\"}\n\n:\n\nid: 1-3\r\n\r\n";
        let whole = Messages::default().feed(text).expect("whole");
        assert_eq!(whole.len(), 4);
        assert_eq!(whole[1].data, b"{\"a\":\"id: 7\"}");
        assert_eq!((whole[1].id.as_deref(), whole[1].event.as_str()), (Some("1-2"), "vm"));
        assert_eq!(whole[2], Message::default());
        assert_eq!(whole[3].id.as_deref(), Some("1-3"));
        for cut in 0..text.len() {
            let mut messages = Messages::default();
            let mut got = messages.feed(&text[..cut]).expect("first");
            got.extend(messages.feed(&text[cut..]).expect("second"));
            assert_eq!(got, whole, "cut at {cut}");
        }
        assert!(Messages::default().feed(&vec![b'x'; MAX_EVENT + 1]).is_err());
    }

    #[test]
    fn lines_come_below_their_titles_and_grow() {
        let mut lines = Lines { wide: false, widths: Vec::new() };
        assert_eq!(lines.row(&Bird("owl", "")), "NAME   SAYS\nowl    -");
        assert_eq!(lines.row(&Bird("godwit", "x")), "godwit   x");
        assert_eq!(lines.row(&Bird("owl", "hoo")), "owl      hoo");
        assert_eq!(lasting(&Bird("owl", "hoo")), ["owl", "hoo"]);
    }

    #[test]
    fn a_table_is_cut_to_the_terminal() {
        let table = "NAME   SAYS\nowl    hoo\ngodwit\nkite\n";
        assert_eq!(
            screen(table, (80, 24)),
            "\x1b[HNAME   SAYS\x1b[K\r\nowl    hoo\x1b[K\r\ngodwit\x1b[K\r\nkite\x1b[K\r\n\x1b[J"
        );
        assert_eq!(
            screen(table, (5, 4)),
            "\x1b[HNAME \x1b[K\r\nowl  \x1b[K\r\nand 2 more\x1b[K\r\n\x1b[J"
        );
    }
}

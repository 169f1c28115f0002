//! Changes as operations: asking, following, and showing how far they are.

use std::collections::HashMap;
use std::time::Duration;

use futures::StreamExt;
use godwit_cloud::controller::Accepted;
use godwit_cloud::registry::OpRecord;
use godwit_types::Fault;
use godwit_types::{Code, OpId, OpState};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use reqwest::Method;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::args::{Change, ClientArgs};
use crate::client::Client;
use crate::failure::{Failure, Outcome, Result};
use crate::interrupt::Interrupt;
use crate::out;

/// The longest event that is read, in bytes.
const MAX_EVENT: usize = 8 << 20;

/// What a stage without a known end looks like.
const SPINNER: &str = "{prefix:10} {spinner} {msg}";

/// How often a broken stream of events is opened again before that is a failure.
const REOPENS: u32 = 20;

/// What became of a request for a change.
#[derive(Debug)]
pub(crate) enum Changed {
    /// It ended well.
    Done {
        /// The operation, if it took one.
        op: Option<Box<OpRecord>>,
        /// The object it concerned.
        target: Option<String>,
    },
    /// There is nothing more to say: a dry run or `--no-wait`, reported already.
    Reported,
}

/// Asks for a change and waits for its end, as the flags say.
pub(crate) async fn change<B: Serialize + Sync>(
    client: &Client,
    client_args: &ClientArgs,
    how: &Change,
    method: Method,
    path: &str,
    body: &B,
) -> Result<Changed> {
    let mark = if path.contains('?') { '&' } else { '?' };
    let path = if how.dry_run { format!("{path}{mark}dry_run=true") } else { path.to_owned() };
    let deadline = how.timeout.map(|t| Instant::now() + t);
    let asked = client.ask(method, &path, Some(body));
    let accepted: Accepted = match deadline {
        None => asked.await?,
        Some(d) => tokio::time::timeout_at(d, asked).await.unwrap_or_else(|_| {
            let words = format!("{} has not answered in time; it may still do it", client.base());
            Err(Failure::new(Code::TimedOut, words).hint("see what it does with: godwit op list"))
        })?,
    };
    if how.dry_run {
        let words = format!("would: {}", accepted.plan);
        let data = json!({ "dry_run": true, "plan": accepted.plan, "target": accepted.target });
        out::action(client_args.output, &words, &accepted.target.unwrap_or_default(), &data)?;
        return Ok(Changed::Reported);
    }
    let Some(op) = accepted.op else {
        return Ok(Changed::Done { op: None, target: accepted.target });
    };
    if how.no_wait {
        let words = format!("{op}   started: {}", accepted.plan);
        let data = json!({ "op": op, "plan": accepted.plan, "target": accepted.target });
        out::action(client_args.output, &words, &op.to_string(), &data)?;
        return Ok(Changed::Reported);
    }
    let record = follow(client, op, deadline).await?;
    Ok(Changed::Done { op: Some(Box::new(record)), target: accepted.target })
}

/// As [`change`], with one line of words and the operation's result as data.
pub(crate) async fn change_and_report<B: Serialize + Sync>(
    client: &Client,
    client_args: &ClientArgs,
    how: &Change,
    (method, path): (Method, &str),
    body: &B,
    (name, words): (&str, &str),
) -> Result {
    if let Changed::Done { op, .. } = change(client, client_args, how, method, path, body).await? {
        let (id, result) = parts(op);
        let mut data = json!({ "op": id, "name": name });
        if let (Value::Object(all), Some(Value::Object(more))) = (&mut data, result) {
            all.extend(more);
        }
        out::action(client_args.output, words, name, &data)?;
    }
    Ok(Outcome::Done)
}

/// Id and result of an operation.
pub(crate) fn parts(op: Option<Box<OpRecord>>) -> (Option<OpId>, Option<Value>) {
    op.map_or((None, None), |o| (Some(o.id), o.result))
}

/// Waits for the end of an operation and shows how far it is.
pub(crate) async fn follow(
    client: &Client,
    op: OpId,
    deadline: Option<Instant>,
) -> Result<OpRecord> {
    let mut interrupt = Interrupt::listen()?;
    let mut bars = Bars::new();
    let late = async {
        match deadline {
            Some(d) => tokio::time::sleep_until(d).await,
            None => std::future::pending().await,
        }
    };
    let record = tokio::select! {
        r = until_final(client, op, &mut bars) => r?,
        () = late => {
            let words = format!("operation {op} has not ended in time; it goes on");
            return Err(Failure::new(Code::TimedOut, words)
                .hint(format!("wait on with: godwit op wait {op}")));
        }
        () = interrupt.pressed() => {
            let words = format!("no longer waiting for operation {op}; it goes on");
            return Err(Failure::new(Code::Cancelled, words)
                .hint(format!("stop it with: godwit op cancel {op}")));
        }
    };
    bars.clear();
    verdict(record)
}

/// A failed or cancelled operation as a failure.
fn verdict(record: OpRecord) -> Result<OpRecord> {
    match record.state {
        OpState::Failed => Err(record
            .error
            .unwrap_or_else(|| Fault::internal(format!("operation {} failed", record.id)))
            .into()),
        OpState::Cancelled => {
            Err(Failure::new(Code::Cancelled, format!("operation {} was cancelled", record.id)))
        }
        _ => Ok(record),
    }
}

async fn until_final(client: &Client, op: OpId, bars: &mut Bars) -> Result<OpRecord> {
    let mut broken = 0;
    loop {
        let why = match events(client, op, bars).await {
            Ok(Some(record)) => return Ok(record),
            Ok(None) => Failure::unavailable(format!("the center stopped telling of {op}")),
            Err(e) => e,
        };
        broken += 1;
        if why.exit != Code::Unavailable.exit_code() {
            return Err(why);
        }
        if broken > REOPENS {
            return Err(why.hint(format!("it may go on; wait on with: godwit op wait {op}")));
        }
        // The center may be coming back; its journal says how the operation ended.
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// Reads events until the final one; none when the stream ends before it.
async fn events(client: &Client, op: OpId, bars: &mut Bars) -> Result<Option<OpRecord>> {
    let request = client.request(Method::GET, &format!("/v1/ops/{op}/events"));
    let answer = client.send(request).await?;
    let mut stream = answer.bytes_stream();
    let mut lines = Lines::default();
    while let Some(part) = stream.next().await {
        let part = part.map_err(|e| client.broken(&e))?;
        for data in lines.feed(&part)? {
            let record: OpRecord = serde_json::from_slice(&data)
                .map_err(|e| Failure::internal(format!("an event of {op}: {e}")))?;
            bars.show(&record);
            if record.state.is_final() {
                return Ok(Some(record));
            }
        }
    }
    Ok(None)
}

/// The `data:` lines of server-sent events, as they arrive in parts.
#[derive(Debug, Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn feed(&mut self, part: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.rest.extend_from_slice(part);
        let mut out = Vec::new();
        while let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = line.trim_ascii_end();
            if let Some(data) = line.strip_prefix(b"data:") {
                out.push(data.trim_ascii_start().to_vec());
            }
        }
        if self.rest.len() > MAX_EVENT {
            return Err(Failure::internal("an event of the center is too long"));
        }
        Ok(out)
    }
}

/// One bar for each stage, on terminals only.
struct Bars {
    all: MultiProgress,
    stages: HashMap<String, ProgressBar>,
}

impl Bars {
    fn new() -> Self {
        let target = if out::shows_progress() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        Self { all: MultiProgress::with_draw_target(target), stages: HashMap::new() }
    }

    fn show(&mut self, record: &OpRecord) {
        for p in &record.progress {
            let bar = self.stages.entry(p.stage.clone()).or_insert_with(|| {
                // Dressed before it is shown.
                let bar = ProgressBar::new(0)
                    .with_style(style(SPINNER))
                    .with_prefix(out::plain(&p.stage));
                self.all.add(bar)
            });
            if p.total > 0 {
                bar.set_style(style("{prefix:10} {bar:24} {msg}"));
                bar.set_length(p.total);
                bar.set_position(p.done.min(p.total));
            } else {
                bar.set_style(style(SPINNER));
                bar.tick();
            }
            let figure = match p.unit.as_str() {
                "bytes" if p.total > 0 => {
                    format!("{} of {}", out::size(p.done), out::size(p.total))
                }
                "bytes" => out::size(p.done),
                _ => String::new(),
            };
            bar.set_message(out::plain(format!("{figure} {}", p.note).trim()));
        }
    }

    fn clear(&self) {
        for bar in self.stages.values() {
            bar.finish_and_clear();
        }
    }
}

/// A bar of plain characters: the same with and without `NO_COLOR`.
pub(crate) fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("## ")
        .tick_chars("-\\|/ ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_found_however_they_are_cut() {
        let text = b"data: {\"a\":1}\n\n: keep-alive\n\ndata:{\"a\":2}\r\n\r\n";
        for cut in 0..text.len() {
            let mut lines = Lines::default();
            let mut got = lines.feed(&text[..cut]).expect("first");
            got.extend(lines.feed(&text[cut..]).expect("second"));
            assert_eq!(got, [b"{\"a\":1}".to_vec(), b"{\"a\":2}".to_vec()], "cut at {cut}");
        }
        assert!(Lines::default().feed(&vec![b'x'; MAX_EVENT + 1]).is_err());
    }
}

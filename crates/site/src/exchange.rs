//! A substrate from one site to another: the taker says which units it lacks, the supplier gives
//! those. Whoever stands between the two streams passes on what they send and tells how far it is:
//! the taker's own site where it reaches the supplier's, else the center.

use std::time::Duration;

use godwit_substrate::{SubstrateError, TakerMsg};
use godwit_types::{Code, Fault, Name};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};

use crate::frames::{FrameReader, GIVEN_UP, part_head};
use crate::{ByteStream, Call, Progress, SubstrateInfo, bounds};

/// How long the two ends may take to hear that a bring is given up.
const HEARD: Duration = Duration::from_secs(5);

/// Why a bring did not come to its end.
#[derive(Debug)]
pub enum Failed {
    /// A link broke; what came so far is kept at the taker.
    Broken(Fault),
    /// Anything else.
    For(Fault),
}

/// Whether it is a link that failed, and not what a site did.
#[must_use]
pub const fn is_break(f: &Fault) -> bool {
    matches!(f.code, Code::Unavailable | Code::TimedOut)
}

/// One bring.
#[derive(Debug)]
pub struct Bring<'a> {
    /// The substrate's name, for messages.
    pub name: &'a Name,
    /// The supplier.
    pub from: &'a Name,
    /// The taker.
    pub to: &'a Name,
    /// Who hears of its progress, and may stop it.
    pub call: &'a Call,
}

impl Bring<'_> {
    /// Shows how far it is, in pages.
    pub fn show(&self, done: u64, total: u64, note: String) {
        let (stage, unit) = ("substrate".into(), "pages".into());
        self.call.progress(Progress { stage, done, total, unit, note });
    }

    /// Carries a substrate between the streams of supplier and taker.
    ///
    /// # Errors
    /// [`Failed`]: whether it may go on over other streams.
    pub async fn run(&self, ends: (ByteStream, ByteStream)) -> Result<SubstrateInfo, Failed> {
        let ((out, wants), (control, into)) = (tokio::io::split(ends.0), tokio::io::split(ends.1));
        let out = FrameReader::new(out, self.from.clone());
        let both = async { tokio::join!(self.supply(out, into), self.serve(control, wants)) };
        let given_up = async {
            self.call.cancel.cancelled().await;
            tokio::time::sleep(HEARD).await;
        };
        let (supplied, taken) = tokio::select! {
            both = both => both,
            () = given_up => return Err(Failed::For(Fault::cancelled())),
        };
        match (supplied, taken) {
            (_, Ok(info)) => Ok(info),
            // The taker saw only that the stream ended.
            (Err(f), _) | (Ok(()), Err(f)) if is_break(&f) => Err(Failed::Broken(f)),
            (Err(f), _) | (Ok(()), Err(f)) => Err(Failed::For(f)),
        }
    }

    /// Passes on what the supplier gives, until its end. Fails for what went wrong there or because
    /// the bring was cancelled; a taker that takes no more says why itself.
    async fn supply(
        &self,
        mut out: FrameReader<ReadHalf<ByteStream>>,
        mut into: WriteHalf<ByteStream>,
    ) -> Result<(), Fault> {
        loop {
            let part = tokio::select! {
                part = out.next() => part,
                () = self.call.cancel.cancelled() => Err(Fault::cancelled()),
            };
            let written = match &part {
                Ok(Some(part)) => match into.write_all(&part_head(part)).await {
                    Ok(()) => into.write_all(part).await,
                    failed => failed,
                },
                Err(f) if f.code == Code::Cancelled => into.write_all(&GIVEN_UP).await,
                // What came is kept: another try, perhaps elsewhere, brings the rest.
                Ok(None) | Err(_) => into.shutdown().await,
            };
            match part {
                Ok(Some(_)) if written.is_ok() => {}
                Ok(_) => return Ok(()),
                Err(f) => return Err(f),
            }
        }
    }

    /// Passes on what the taker asks for, and reads its verdict.
    async fn serve(
        &self,
        mut control: ReadHalf<ByteStream>,
        mut wants: WriteHalf<ByteStream>,
    ) -> Result<SubstrateInfo, Fault> {
        let (mut done, mut total, mut note) = (0, 0, String::new());
        let asked = loop {
            let message = match self.message(&mut control).await {
                Ok(message) => message,
                Err(f) => break Err(f),
            };
            match &message {
                TakerMsg::Lacking { units, of } => {
                    total = *units;
                    let there = of.saturating_sub(*units);
                    note = format!("{} to {}, {there} of {of} are there", self.from, self.to);
                }
                TakerMsg::Want(hashes) => done += hashes.len() as u64,
                TakerMsg::Enough => {}
            }
            self.show(done, total.max(done), note.clone());
            // A supplier that is gone is heard of by the other direction.
            if !matches!(message, TakerMsg::Lacking { .. }) {
                let _ = wants.write_all(&message.encode()).await;
            }
            if message == TakerMsg::Enough {
                break Ok(());
            }
        };
        let _ = wants.shutdown().await;
        asked?;
        verdict(control, self.name).await
    }

    async fn message(&self, from: &mut (impl AsyncRead + Unpin)) -> Result<TakerMsg, Fault> {
        let broken = |e| cut("bringing", self.name, &e);
        let bad = |e: SubstrateError| {
            let f = Fault::of(&e);
            Fault { message: format!("site '{}': {}", self.to, f.message), ..f }
        };
        let tag = from.read_u8().await.map_err(broken)?;
        let len = TakerMsg::fixed(tag).ok_or_else(|| {
            Fault::new(Code::Damaged, format!("site '{}' sent no known message", self.to))
        })?;
        let mut fixed = vec![0; len];
        from.read_exact(&mut fixed).await.map_err(broken)?;
        let mut hashes = vec![0; TakerMsg::hashes(tag, &fixed).map_err(bad)?];
        from.read_exact(&mut hashes).await.map_err(broken)?;
        TakerMsg::decode(tag, &fixed, &hashes).map_err(bad)
    }
}

fn cut(doing: &str, name: &Name, e: &std::io::Error) -> Fault {
    Fault::unavailable(format!("{doing} substrate '{name}': {e}"))
}

/// Ends an import: no more bytes, then the site's verdict as JSON.
///
/// # Errors
/// The site's refusal, or a broken stream.
pub async fn finish_import(mut into: ByteStream, name: &Name) -> Result<SubstrateInfo, Fault> {
    into.shutdown().await.map_err(|e| cut("writing", name, &e))?;
    verdict(into, name).await
}

/// Reads a site's verdict on a substrate that it took in, up to the end of the stream.
///
/// # Errors
/// The site's refusal, or a broken stream.
async fn verdict(
    from: impl tokio::io::AsyncRead + Unpin,
    name: &Name,
) -> Result<SubstrateInfo, Fault> {
    let mut verdict = Vec::new();
    from.take(64 << 10).read_to_end(&mut verdict).await.map_err(|e| cut("writing", name, &e))?;
    if verdict.is_empty() {
        return Err(cut("writing", name, &std::io::ErrorKind::UnexpectedEof.into()));
    }
    let verdict = serde_json::from_slice::<Result<SubstrateInfo, Fault>>(&verdict)
        .map_err(|e| Fault::new(Code::Damaged, format!("the verdict on '{name}': {e}")))?;
    let mut info = verdict.map_err(bounds::fault)?;
    bounds::substrate(&mut info)?;
    Ok(info)
}

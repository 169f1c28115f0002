//! A substrate from one site to another: the taker says which units it lacks, the supplier gives
//! those. The center stands between the two, passes on what they send, and shows how far it is.

use std::time::Duration;

use godwit_site::frames::{FrameReader, GIVEN_UP, part_head};
use godwit_site::{ByteStream, Progress, StreamRequest, SubstrateInfo};
use godwit_substrate::{SubstrateError, TakerMsg};
use godwit_types::{Code, Fault, Name};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::Instant;

use super::Controller;
use super::bring::{cut, verdict};
use crate::ops::OpHandle;
use crate::registry::SubstrateRecord;

/// How often one bring goes on after a break.
const BREAKS: usize = 5;

/// How long a site that was lost in the midst of a bring may stay away.
const AWAY: Duration = Duration::from_secs(60);

/// How long the two ends may take to hear that a bring is given up.
const HEARD: Duration = Duration::from_secs(5);

/// Why a bring did not come to its end.
enum Failed {
    /// A link broke; what came so far is kept at the taker.
    Broken(Fault),
    /// Anything else.
    For(Fault),
}

/// One bring.
struct Bring<'a> {
    op: &'a OpHandle,
    s: &'a SubstrateRecord,
    from: &'a Name,
    to: &'a Name,
}

impl Controller {
    /// Brings a substrate from one site to another, going on where it stopped when a link breaks
    /// and comes back.
    pub(super) async fn carry(
        &self,
        op: &OpHandle,
        s: &SubstrateRecord,
        from: &Name,
        to: &Name,
    ) -> Result<SubstrateInfo, Fault> {
        let bring = Bring { op, s, from, to };
        let mut breaks = 0;
        let mut patience = Duration::ZERO;
        loop {
            let ends = tokio::select! {
                ends = self.ends(&bring, patience) => ends?,
                () = op.cancel().cancelled() => return Err(Fault::cancelled()),
            };
            match bring.run(ends).await {
                Ok(info) => return Ok(info),
                Err(Failed::Broken(f)) if breaks < BREAKS => {
                    breaks += 1;
                    patience = AWAY;
                    tracing::warn!(substrate = %s.name, %from, %to, error = %f, "a bring broke off; it goes on");
                    bring.show(0, 0, format!("the link broke; waiting for {from} and {to}"));
                }
                Err(Failed::Broken(f) | Failed::For(f)) => return Err(f),
            }
        }
    }

    /// The streams of supplier and taker, waiting at most `patience` for a site that is away.
    async fn ends(
        &self,
        bring: &Bring<'_>,
        patience: Duration,
    ) -> Result<(ByteStream, ByteStream), Fault> {
        let until = Instant::now() + patience;
        let mut changes = self.sites.changes.subscribe();
        loop {
            let open = async {
                let supply = StreamRequest::SubstrateSupply { id: bring.s.id };
                let out = self.host(bring.from)?.open(supply).await?;
                let take = StreamRequest::SubstrateTake { content: bring.s.content };
                Ok((out, self.host(bring.to)?.open(take).await?))
            };
            match open.await {
                Err(f) if is_break(&f) => {
                    match tokio::time::timeout_at(until, changes.changed()).await {
                        Ok(Ok(())) => {}
                        _ => return Err(f),
                    }
                }
                ends => return ends,
            }
        }
    }
}

/// Whether it is a link that failed, and not what a site did.
const fn is_break(f: &Fault) -> bool {
    matches!(f.code, Code::Unavailable | Code::TimedOut)
}

impl Bring<'_> {
    fn show(&self, done: u64, total: u64, note: String) {
        let (stage, unit) = ("substrate".into(), "pages".into());
        self.op.progress(Progress { stage, done, total, unit, note });
    }

    async fn run(&self, ends: (ByteStream, ByteStream)) -> Result<SubstrateInfo, Failed> {
        let ((out, wants), (control, into)) = (tokio::io::split(ends.0), tokio::io::split(ends.1));
        let out = FrameReader::new(out, self.from.clone());
        let both = async { tokio::join!(self.supply(out, into), self.serve(control, wants)) };
        let given_up = async {
            self.op.cancel().cancelled().await;
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
                () = self.op.cancel().cancelled() => Err(Fault::cancelled()),
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
        verdict(control, &self.s.name).await
    }

    async fn message(&self, from: &mut (impl AsyncRead + Unpin)) -> Result<TakerMsg, Fault> {
        let broken = |e| cut("bringing", &self.s.name, &e);
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

//! Substrates that come and go: as files for people, and by the units that another site lacks.

use std::io::BufReader;

use godwit_substrate::{AsyncPool, ImportAs, Substrate, SubstrateError, TakerMsg};
use godwit_types::{Fault, Hash, Name, SubstrateId};
use tokio::io::{AsyncWriteExt, DuplexStream, WriteHalf};
use tokio_util::io::SyncIoBridge;

use super::faults::{into_fault, join_error};
use super::substrates::{Substrates, info};
use crate::frames::{FrameWriter, PartReader};
use crate::{ByteStream, SubstrateInfo};

/// Bytes that a substrate's stream buffers between its two ends.
const PIPE: usize = 1 << 20;

impl Substrates {
    /// A substrate as a stream to read: an archive in frames. Refused before its first byte when
    /// something of it is damaged.
    pub(super) async fn export(&self, id: SubstrateId) -> Result<ByteStream, Fault> {
        let sound = self.pool.run("checking a substrate", move |pool| pool.verify_units(id)).await;
        sound.map_err(into_fault)?;
        let (near, far) = tokio::io::duplex(PIPE);
        self.pool.start(move |pool| {
            let mut to = FrameWriter::new(SyncIoBridge::new(far));
            let done = pool.export(id, &mut to).map(drop).map_err(into_fault);
            if let Err(f) = &done {
                tracing::warn!(%id, error = %f, "an export broke off");
            }
            if let Err(error) = to.end(done.as_ref().copied()) {
                tracing::info!(%id, %error, "an export has no reader any more");
            }
        });
        Ok(Box::pin(near))
    }

    /// A stream to write a substrate to; after its end the site answers with one event.
    pub(super) fn import(&self, becomes: ImportAs) -> ByteStream {
        let (near, far) = tokio::io::duplex(PIPE);
        let (pool, site) = (self.pool.clone(), self.site.clone());
        tokio::spawn(async move {
            if let Err(e) = import_archive(pool, site, becomes, far).await {
                tracing::warn!(error = %e, "an import's answer could not be delivered");
            }
        });
        Box::pin(near)
    }

    /// A stream on which another site asks for the units of a substrate that it lacks.
    pub(super) fn supply(&self, id: SubstrateId) -> ByteStream {
        let (near, far) = tokio::io::duplex(PIPE);
        let (read, write) = tokio::io::split(far);
        let (wants, out) = (BufReader::new(SyncIoBridge::new(read)), SyncIoBridge::new(write));
        self.pool.start(move |pool| {
            let mut to = FrameWriter::new(out);
            let done = pool.supply(id, wants, &mut to).map_err(into_fault);
            if let Err(f) = &done {
                tracing::warn!(%id, error = %f, "a substrate was not handed to the end");
            }
            if let Err(error) = to.end(done.as_ref().copied()) {
                tracing::info!(%id, %error, "nobody takes a substrate any more");
            }
        });
        Box::pin(near)
    }

    /// A stream on which a substrate of that content comes from another site.
    pub(super) fn take(
        &self,
        content: Option<Hash>,
        among: Option<Vec<SubstrateId>>,
    ) -> ByteStream {
        let (near, far) = tokio::io::duplex(PIPE);
        let (pool, site) = (self.pool.clone(), self.site.clone());
        tokio::spawn(async move {
            let (read, write) = tokio::io::split(far);
            let parts = BufReader::new(PartReader::new(SyncIoBridge::new(read)));
            let becomes = ImportAs { content, among, ..ImportAs::default() };
            let taken = pool.start(move |pool| {
                let mut control = SyncIoBridge::new(write);
                let taken = pool.take(becomes, parts, &mut control);
                (taken, control.into_inner())
            });
            match taken.await {
                Ok((taken, mut write)) => {
                    if let Err(error) = send_verdict(&site, taken, &mut write, true).await {
                        tracing::info!(%error, "nobody hears what became of a substrate");
                    }
                }
                Err(e) => tracing::error!(error = %join_error(e), "a substrate was not taken in"),
            }
        });
        Box::pin(near)
    }
}

async fn import_archive(
    pool: AsyncPool,
    site: Name,
    becomes: ImportAs,
    far: DuplexStream,
) -> std::io::Result<()> {
    let (read, mut write) = tokio::io::split(far);
    let reader = SyncIoBridge::new(read);
    let outcome = pool.start(move |pool| pool.import(reader, becomes)).await;
    match outcome {
        Ok(taken) => send_verdict(&site, taken, &mut write, false).await,
        Err(e) => Err(std::io::Error::other(join_error(e).message)),
    }
}

/// Ends a stream on which a substrate came: after [`TakerMsg::Enough`], where there were messages,
/// the verdict as JSON.
async fn send_verdict(
    site: &Name,
    taken: Result<Substrate, SubstrateError>,
    to: &mut WriteHalf<DuplexStream>,
    messages: bool,
) -> std::io::Result<()> {
    let verdict: Result<SubstrateInfo, Fault> = match taken {
        Ok(s) => Ok(info(&s, None)),
        Err(e) => Err(super::advise(site, Fault::of(&e))),
    };
    if messages {
        to.write_all(&TakerMsg::Enough.encode()).await?;
    }
    to.write_all(&serde_json::to_vec(&verdict)?).await?;
    to.shutdown().await
}

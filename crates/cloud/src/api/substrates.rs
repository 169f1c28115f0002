//! Substrates and pools.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, BodyDataStream, HttpBody as _};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use godwit_site::exchange::finish_import;
use godwit_site::frames::FrameReader;
use godwit_site::{ByteStream, Call, PoolReport, SiteHost, StreamRequest, verbs};
use godwit_types::{Code, Fault, Name};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use utoipa::{IntoParams, ToSchema};

use super::{
    Answer, Api, MAX_IMPORT, Params, Path, Payload, Who, accepted, drop_rest, is_type, name,
};
use crate::access::{Action, Object, Principal, default_tenant};
use crate::controller::authorize::{allow, visible_part};
use crate::controller::{Accepted, Exchange, Mode, Unanswered, Uploading, ask_all};
use crate::registry::SubstrateRecord;

/// How long an import may stand still.
const IMPORT_SILENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ImportTo {
    /// The site; the center when left out.
    site: Option<Name>,
    /// Its name here, if not the one it brings; it is a substrate of its own then.
    name: Option<Name>,
}

/// A pool and its site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(super) struct SitePool {
    /// The site.
    site: Name,
    /// What it holds.
    #[serde(flatten)]
    pool: PoolReport,
}

/// The pools of the sites that answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(super) struct PoolList {
    /// What they hold.
    pools: Vec<SitePool>,
    /// The sites that did not answer.
    unanswered: Vec<Unanswered>,
}

/// All substrates.
#[utoipa::path(get, path = "/v1/substrates", responses((status = 200, body = Vec<SubstrateRecord>)))]
pub(super) async fn list(State(api): State<Api>, who: Who) -> Answer<Json<Vec<SubstrateRecord>>> {
    let mut all = api.controller.finder.substrates_for(&who)?;
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Json(all))
}

/// One substrate, by name or id.
#[utoipa::path(get, path = "/v1/substrates/{substrate}", params(("substrate" = String, Path)),
    responses((status = 200, body = SubstrateRecord), (status = 404, body = Fault)))]
pub(super) async fn one(
    State(api): State<Api>,
    who: Who,
    Path(s): Path<String>,
) -> Answer<Json<SubstrateRecord>> {
    Ok(Json(visible_part(&who, api.controller.finder.substrate_for(&who, Action::See, &s)?)))
}

/// Removes a substrate from every site that holds it.
#[utoipa::path(delete, path = "/v1/substrates/{substrate}", params(("substrate" = String, Path), super::DryRun),
    responses((status = 200, body = Accepted), (status = 404, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn remove(
    State(api): State<Api>,
    who: Who,
    Path(s): Path<String>,
    Params(dry): Params<super::DryRun>,
) -> Answer<Response> {
    Ok(accepted(api.controller.pool.substrate_delete(&who, &s, dry.mode()).await?))
}

/// Boots the disk that a substrate stores and docks the machine in its place: for one whose saved
/// state no QEMU loads any more.
#[utoipa::path(post, path = "/v1/substrates/{substrate}/rebuild",
    params(("substrate" = String, Path), super::DryRun),
    responses((status = 202, body = Accepted), (status = 404, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn rebuild(
    State(api): State<Api>,
    who: Who,
    Path(s): Path<String>,
    Params(dry): Params<super::DryRun>,
) -> Answer<Response> {
    Ok(accepted(api.controller.substrate_rebuild(&who, &s, dry.mode()).await?))
}

/// To whom a substrate is granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// The tenant that may use it.
    pub tenant: Name,
}

/// Lets another tenant use a restricted substrate.
#[utoipa::path(post, path = "/v1/substrates/{substrate}/grants", request_body = Grant,
    params(("substrate" = String, Path)),
    responses((status = 200, body = SubstrateRecord), (status = 403, body = Fault), (status = 404, body = Fault),
    (status = 409, body = Fault)))]
pub(super) async fn grant(
    State(api): State<Api>,
    who: Who,
    Path(s): Path<String>,
    Payload(to): Payload<Grant>,
) -> Answer<Json<SubstrateRecord>> {
    Ok(Json(api.controller.accounts.grant(&who, &s, &to.tenant, true)?))
}

/// Another tenant may no longer use a substrate; machines that it has made of it stay.
#[utoipa::path(delete, path = "/v1/substrates/{substrate}/grants/{tenant}",
    params(("substrate" = String, Path), ("tenant" = String, Path)),
    responses((status = 200, body = SubstrateRecord), (status = 403, body = Fault), (status = 404, body = Fault)))]
pub(super) async fn revoke(
    State(api): State<Api>,
    who: Who,
    Path((s, tenant)): Path<(String, String)>,
) -> Answer<Json<SubstrateRecord>> {
    Ok(Json(api.controller.accounts.grant(&who, &s, &name(&tenant)?, false)?))
}

/// A substrate as one file. Refused when something of it is damaged; a body that is cut off is not
/// whole, whatever cut it.
#[utoipa::path(get, path = "/v1/substrates/{substrate}/export", params(("substrate" = String, Path)),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>),
    (status = 404, body = Fault), (status = 500, body = Fault), (status = 503, body = Fault)))]
pub(super) async fn export(
    State(api): State<Api>,
    who: Who,
    Path(s): Path<String>,
) -> Answer<Response> {
    let s = api.controller.finder.substrate_for(&who, Action::Use, &s)?;
    let mut holders: Vec<_> = s.holders.iter().collect();
    holders.sort_by_key(|n| s.damaged.contains_key(*n));
    let host =
        holders.into_iter().find_map(|n| api.controller.sites.host(n).ok()).ok_or_else(|| {
            Fault::unavailable(format!("no reachable site holds substrate '{}'", s.name))
        })?;
    let stream = host.open(StreamRequest::SubstrateExport { id: s.id }).await?;
    api.controller.accounts.note_substrate(&who, "substrate export", &s);
    let frames = FrameReader::new(stream, host.name().clone());
    // An error in the stream cuts the body off, so that no client takes it for whole.
    let body = futures::stream::try_unfold(frames, async |mut frames| match frames.next().await {
        Ok(part) => Ok(part.map(|part| (part, frames))),
        Err(f) => {
            tracing::warn!(error = %f, "an export broke off");
            Err(f)
        }
    });
    let body = Body::from_stream(body);
    Ok(([(CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

/// Takes a substrate that was exported; streamed, at most 64 GiB.
#[utoipa::path(post, path = "/v1/substrates", params(ImportTo),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 201, body = SubstrateRecord), (status = 409, body = Fault), (status = 413, body = Fault),
    (status = 422, body = Fault), (status = 507, body = Fault)))]
pub(super) async fn import(
    State(api): State<Api>,
    who: Who,
    Params(to): Params<ImportTo>,
    headers: HeaderMap,
    body: Body,
) -> Answer<(StatusCode, Json<SubstrateRecord>)> {
    if !is_type(&headers, "application/octet-stream") {
        return Err(Fault::invalid("the body must be application/octet-stream").into());
    }
    if body.size_hint().lower() > MAX_IMPORT {
        return Err(too_large().into());
    }
    let bytes = body.size_hint().exact();
    let mut body = body.into_data_stream();
    let begun = begin_import(&api, &who, to, bytes).await;
    // What a site has got whole it publishes: whoever hangs up then leaves nothing unlisted.
    let taken = tokio::spawn(async move {
        let taken = match begun {
            Ok(import) => import.take(&mut body).await,
            Err(f) => Err(f),
        };
        if taken.is_err() {
            // A sender that is cut off while it sends never reads why.
            tokio::spawn(async move { drop_rest(&mut body).await });
        }
        taken
    });
    let record = taken.await.map_err(|e| Fault::internal(e.to_string()))??;
    Ok((StatusCode::CREATED, Json(record)))
}

/// A file that comes to a site.
struct Import {
    api: Api,
    who: Principal,
    host: Arc<dyn SiteHost>,
    /// What the site is told of it, if it is a user's.
    upload: Option<Uploading>,
    into: ByteStream,
    /// Its length in bytes, if that is known.
    bytes: Option<u64>,
    label: Name,
}

/// Opens the way of a file of `bytes`, if that is known, to a site.
async fn begin_import(
    api: &Api,
    who: &Principal,
    to: ImportTo,
    bytes: Option<u64>,
) -> Result<Import, Fault> {
    if let Some(n) = &to.name
        && api.controller.registry().substrate_named(&who.tenant, n)
    {
        return Err(Fault::new(Code::Exists, format!("substrate '{n}' exists already")));
    }
    let site = match to.site {
        Some(s) => s,
        None => api.controller.pool.center()?,
    };
    let host = api.controller.sites.host(&site)?;
    let label = to.name.clone().unwrap_or(site);
    // An operator brings back what was exported, as it was; whatever else comes is its bringer's.
    let upload = match (who.is_operator() && who.tenant == default_tenant(), &to.name) {
        (true, _) => None,
        (false, Some(name)) => Some(api.controller.exchange.begin_upload(who, name, bytes)?),
        (false, None) => {
            return Err(Fault::invalid("say what it is to be called").hint("add --name NAME"));
        }
    };
    let request = match &upload {
        Some(upload) => StreamRequest::SubstrateUpload(upload.want.clone()),
        None => StreamRequest::SubstrateImport { name: to.name, content: None },
    };
    let into = host.open(request).await?;
    let (api, who) = (api.clone(), who.clone());
    Ok(Import { api, who, host, upload, into, bytes, label })
}

impl Import {
    /// Sends all of it. Answers whether the site takes no more of it.
    async fn send(&mut self, body: &mut BodyDataStream) -> Result<bool, Fault> {
        let mut taken = 0u64;
        let silent = |_| Fault::new(Code::TimedOut, "no more of the body came");
        while let Some(chunk) =
            tokio::time::timeout(IMPORT_SILENCE, body.next()).await.map_err(silent)?
        {
            let chunk = chunk.map_err(|e| Fault::invalid(format!("the body was cut off: {e}")))?;
            taken += chunk.len() as u64;
            if taken > MAX_IMPORT {
                return Err(too_large());
            }
            if let Some(upload) = &self.upload {
                upload.count(chunk.len() as u64)?;
            }
            // A site that refuses closes its end; its verdict follows.
            if self.into.write_all(&chunk).await.is_err() {
                return Ok(true);
            }
        }
        match self.bytes {
            Some(bytes) if bytes != taken => Err(Fault::invalid("the body was cut off")),
            _ => Ok(false),
        }
    }

    /// Brings it to its end.
    async fn take(mut self, body: &mut BodyDataStream) -> Result<SubstrateRecord, Fault> {
        let sent = self.send(body).await;
        let Self { api, who, host, upload, into, label, .. } = self;
        let site = host.name();
        if upload.is_none()
            && let Err(f) = sent
        {
            return Err(f);
        }
        let less = || Fault::internal("the site took less than was sent");
        let info = match finish_import(into, &label).await {
            // What an operator brings may have been there before: nothing of it is removed.
            Ok(_) if upload.is_none() && matches!(sent, Ok(true)) => return Err(less()),
            Ok(info) => info,
            Err(f) => return Err(sent.err().unwrap_or(f)),
        };
        let id = info.id;
        let wanted = match &upload {
            Some(upload) => Exchange::is_wanted(site, upload.want.id, &info),
            None => Ok(()),
        };
        let adopted = match (wanted, sent) {
            (Err(f), _) | (_, Err(f)) => Err(f),
            (_, Ok(true)) => Err(less()),
            (_, Ok(false)) if upload.is_some() => {
                api.controller.exchange.adopt_substrate(site, info)
            }
            (_, Ok(false)) => api.controller.exchange.adopt_import(site, info),
        };
        match adopted {
            Ok(record) => {
                api.controller.accounts.note(&who, "substrate import", record.name.as_str());
                Ok(record)
            }
            Err(f) => {
                // What the center does not know nobody could use or delete.
                if let Err(error) = host.ask(verbs::SubstrateDelete { id }, Call::quiet()).await {
                    tracing::warn!(%id, %site, %error, "a refused substrate is still there");
                }
                Err(f)
            }
        }
    }
}

fn too_large() -> Fault {
    Fault::new(Code::TooLarge, "the substrate is over 64 GiB")
}

/// The pools of all sites. A site that does not answer in time is named beside them.
#[utoipa::path(get, path = "/v1/pool", responses((status = 200, body = PoolList)))]
pub(super) async fn pool(State(api): State<Api>, who: Who) -> Answer<Json<PoolList>> {
    allow(&who, Action::See, &Object::Cloud, ("site", ""))?;
    let all = ask_all(api.controller.sites.hosts(), async |host| {
        host.ask(verbs::Pool {}, Call::quiet()).await
    });
    let all = all.await;
    let pools = all.answers.into_iter().map(|(site, pool)| SitePool { site, pool }).collect();
    Ok(Json(PoolList { pools, unanswered: all.unanswered }))
}

/// Reads every page and block of a pool and compares it with its hash.
#[utoipa::path(post, path = "/v1/pool/{site}/check", params(("site" = String, Path)),
    responses((status = 202, body = Accepted)))]
pub(super) async fn pool_check(
    State(api): State<Api>,
    who: Who,
    Path(site): Path<String>,
) -> Answer<Response> {
    Ok(accepted(api.controller.pool.pool_check(&who, name(&site)?, Mode::Act)?))
}

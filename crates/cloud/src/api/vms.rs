//! Execution environments.

use axum::Json;
use axum::extract::{Request, State};
use axum::http::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use godwit_site::{Call, ConsoleTail, StreamRequest, verbs};
use godwit_types::{Fault, Name};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{Answer, Api, DryRun, Params, Path, Payload, Who, accepted};
use crate::access::Action;
use crate::controller::{Accepted, CreateVm, DockVm, MigrateVm};
use crate::registry::VmRecord;

/// Which environments to list.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct VmFilter {
    /// Only at this site.
    pub site: Option<Name>,
}

/// What to type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TypeText {
    /// The text; `\n` is the Enter key. At most 4096 characters.
    pub text: String,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct StopHow {
    /// Cut the power instead of asking the guest.
    #[serde(default)]
    force: bool,
    /// Check and tell, change nothing.
    #[serde(default)]
    dry_run: bool,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Tail {
    /// At most so many bytes from the end; 16 KiB when left out.
    max_bytes: Option<u32>,
}

/// Screens and consoles of one site that its machines show at once.
const SCREENS: usize = 64;

/// The longest console tail in bytes.
const MAX_TAIL: u32 = 512 << 10;

/// All environments.
#[utoipa::path(get, path = "/v1/vms", params(VmFilter), responses((status = 200, body = Vec<VmRecord>)))]
pub(super) async fn list(
    State(api): State<Api>,
    who: Who,
    Params(f): Params<VmFilter>,
) -> Answer<Json<Vec<VmRecord>>> {
    if let Some(site) = &f.site {
        // An empty list would say that the site has none.
        let _ = api.controller.registry().sites().get(site)?;
    }
    let mut vms = api.controller.finder.vms_for(&who)?;
    vms.retain(|v| f.site.as_ref().is_none_or(|s| s == &v.site));
    vms.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Json(vms))
}

/// Makes an environment: a cold boot of an image, or an activation of a substrate.
#[utoipa::path(post, path = "/v1/vms", request_body = CreateVm, params(DryRun),
    responses((status = 202, body = Accepted), (status = 409, body = Fault), (status = 507, body = Fault)))]
pub(super) async fn create(
    State(api): State<Api>,
    who: Who,
    Params(dry): Params<DryRun>,
    Payload(want): Payload<CreateVm>,
) -> Answer<Response> {
    Ok(accepted(api.controller.create(&who, want, dry.mode()).await?.0))
}

/// One environment, by name or id.
#[utoipa::path(get, path = "/v1/vms/{vm}", params(("vm" = String, Path)),
    responses((status = 200, body = VmRecord), (status = 404, body = Fault)))]
pub(super) async fn one(
    State(api): State<Api>,
    who: Who,
    Path(vm): Path<String>,
) -> Answer<Json<VmRecord>> {
    Ok(Json(api.controller.finder.vm_for(&who, Action::See, &vm)?))
}

/// Ends an environment and removes its disk.
#[utoipa::path(delete, path = "/v1/vms/{vm}", params(("vm" = String, Path), DryRun),
    responses((status = 202, body = Accepted), (status = 404, body = Fault)))]
pub(super) async fn delete(
    State(api): State<Api>,
    who: Who,
    Path(vm): Path<String>,
    Params(dry): Params<DryRun>,
) -> Answer<Response> {
    Ok(accepted(api.controller.delete(&who, &vm, dry.mode())?))
}

/// Starts a stopped environment.
#[utoipa::path(post, path = "/v1/vms/{vm}/start", params(("vm" = String, Path), DryRun),
    responses((status = 202, body = Accepted), (status = 409, body = Fault)))]
pub(super) async fn start(
    State(api): State<Api>,
    who: Who,
    Path(vm): Path<String>,
    Params(dry): Params<DryRun>,
) -> Answer<Response> {
    Ok(accepted(api.controller.start(&who, &vm, dry.mode())?))
}

/// Powers an environment off.
#[utoipa::path(post, path = "/v1/vms/{vm}/stop", params(("vm" = String, Path), StopHow),
    responses((status = 202, body = Accepted), (status = 409, body = Fault)))]
pub(super) async fn stop(
    State(api): State<Api>,
    who: Who,
    Path(vm): Path<String>,
    Params(how): Params<StopHow>,
) -> Answer<Response> {
    let dry = DryRun { dry_run: how.dry_run };
    Ok(accepted(api.controller.stop(&who, &vm, how.force, dry.mode())?))
}

/// Turns an environment into a substrate.
#[utoipa::path(post, path = "/v1/vms/{vm}/dock", request_body = DockVm,
    params(("vm" = String, Path), DryRun),
    responses((status = 202, body = Accepted), (status = 409, body = Fault)))]
pub(super) async fn dock(
    State(api): State<Api>,
    who: Who,
    Path(vm): Path<String>,
    Params(dry): Params<DryRun>,
    Payload(how): Payload<DockVm>,
) -> Answer<Response> {
    Ok(accepted(api.controller.dock(&who, &vm, how, dry.mode())?))
}

/// Moves a running environment to another site.
#[utoipa::path(post, path = "/v1/vms/{vm}/migrate", request_body = MigrateVm,
    params(("vm" = String, Path), DryRun),
    responses((status = 202, body = Accepted), (status = 404, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn migrate(
    State(api): State<Api>,
    who: Who,
    Path(vm): Path<String>,
    Params(dry): Params<DryRun>,
    Payload(want): Payload<MigrateVm>,
) -> Answer<Response> {
    Ok(accepted(api.controller.moves.migrate(&who, &vm, want, dry.mode())?))
}

/// The end of the serial console's log.
#[utoipa::path(get, path = "/v1/vms/{vm}/console", params(("vm" = String, Path), Tail),
    responses((status = 200, body = ConsoleTail)))]
pub(super) async fn console(
    State(api): State<Api>,
    who: Who,
    Path(vm): Path<String>,
    Params(t): Params<Tail>,
) -> Answer<Json<ConsoleTail>> {
    let vm = api.controller.finder.vm_for(&who, Action::Look, &vm)?;
    let max_bytes = t.max_bytes.unwrap_or(16 << 10).min(MAX_TAIL);
    let host = api.controller.sites.host(&vm.site)?;
    Ok(Json(host.ask(verbs::VmConsole { vm: vm.id, max_bytes }, Call::quiet()).await?))
}

/// The screen as PNG.
#[utoipa::path(get, path = "/v1/vms/{vm}/screenshot", params(("vm" = String, Path)),
    responses((status = 200, content_type = "image/png", body = Vec<u8>), (status = 409, body = Fault)))]
pub(super) async fn screenshot(
    State(api): State<Api>,
    who: Who,
    Path(vm): Path<String>,
) -> Answer<Response> {
    let vm = api.controller.finder.vm_for(&who, Action::Look, &vm)?;
    let host = api.controller.sites.host(&vm.site)?;
    let png = host.ask(verbs::VmScreenshot { vm: vm.id }, Call::quiet()).await?;
    Ok(([(CONTENT_TYPE, "image/png")], png).into_response())
}

/// Types into the keyboard.
#[utoipa::path(post, path = "/v1/vms/{vm}/type", request_body = TypeText, params(("vm" = String, Path)),
    responses((status = 204), (status = 400, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn type_text(
    State(api): State<Api>,
    who: Who,
    Path(vm): Path<String>,
    Payload(t): Payload<TypeText>,
) -> Answer<StatusCode> {
    if t.text.chars().count() > 4096 {
        return Err(Fault::invalid("at most 4096 characters are typed at once").into());
    }
    let vm = api.controller.finder.vm_for(&who, Action::Use, &vm)?;
    let host = api.controller.sites.host(&vm.site)?;
    api.controller.accounts.note_begun(&who.at(&vm.tenant), "vm type", vm.name.as_str());
    host.ask(verbs::VmType { vm: vm.id, text: t.text }, Call::quiet()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The display as a raw RFB stream, after an HTTP/1.1 upgrade to `rfb`.
#[utoipa::path(get, path = "/v1/vms/{vm}/view", params(("vm" = String, Path)),
    responses((status = 101), (status = 400, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn view(
    State(api): State<Api>,
    who: Who,
    Path(vm): Path<String>,
    request: Request,
) -> Answer<Response> {
    let vm = api.controller.finder.vm_for(&who, Action::Use, &vm)?;
    let shown = upgrade(&api, &vm, StreamRequest::Display { vm: vm.id }, "rfb", request).await?;
    api.controller.accounts.note(&who.at(&vm.tenant), "vm view", vm.name.as_str());
    Ok(shown)
}

/// The serial console as a raw byte stream, after an HTTP/1.1 upgrade to `console`.
#[utoipa::path(get, path = "/v1/vms/{vm}/attach", params(("vm" = String, Path)),
    responses((status = 101), (status = 400, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn attach(
    State(api): State<Api>,
    who: Who,
    Path(vm): Path<String>,
    request: Request,
) -> Answer<Response> {
    let vm = api.controller.finder.vm_for(&who, Action::Use, &vm)?;
    let shown =
        upgrade(&api, &vm, StreamRequest::Console { vm: vm.id }, "console", request).await?;
    api.controller.accounts.note(&who.at(&vm.tenant), "vm attach", vm.name.as_str());
    Ok(shown)
}

async fn upgrade(
    api: &Api,
    vm: &VmRecord,
    what: StreamRequest,
    protocol: &'static str,
    mut request: Request,
) -> Answer<Response> {
    if request.headers().get(UPGRADE).is_none_or(|v| v.as_bytes() != protocol.as_bytes()) {
        return Err(Fault::invalid(format!("send 'Upgrade: {protocol}' over HTTP/1.1")).into());
    }
    let host = api.controller.sites.host(&vm.site)?;
    let place = api.screens.place(
        format!("{}/{}", vm.site, vm.tenant),
        api.share(SCREENS),
        // The site itself says when there are too many in all.
        usize::MAX,
    );
    let place = place.ok_or_else(|| {
        let words = "the tenant has as many screens and consoles open at this site as it may";
        Fault::unavailable(words).hint("close one of them")
    })?;
    let mut site = host.open(what).await?;
    let upgraded = hyper::upgrade::on(&mut request);
    let name = vm.name.clone();
    tokio::spawn(async move {
        let _place = place;
        match upgraded.await {
            Ok(up) => {
                let mut user = TokioIo::new(up);
                let end = tokio::io::copy_bidirectional(&mut user, &mut site).await;
                tracing::debug!(vm = %name, protocol, ?end, "stream ended");
            }
            Err(e) => tracing::debug!(vm = %name, protocol, error = %e, "no upgrade"),
        }
    });
    let headers = [
        (CONNECTION, HeaderValue::from_static("upgrade")),
        (UPGRADE, HeaderValue::from_static(protocol)),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

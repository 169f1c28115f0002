//! Programs in guests.

use std::time::Duration;

use axum::Json;
use axum::body::HttpBody as _;
use axum::extract::{FromRequest as _, Request, State};
use axum::http::StatusCode;
use base64::prelude::{BASE64_STANDARD, Engine as _};
use godwit_site::{GuestOutput, GuestProgram};
use godwit_types::{Code, Fault};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::shares::Share;
use super::{Answer, Api, MAX_BODY, Params, Path, Payload, Who, drop_rest};
use crate::access::Action;

/// The longest standard input of a program, in bytes.
pub const MAX_INPUT: usize = 16 << 20;

/// The longest body of a request for a program: its input in base64, and the rest.
const MAX_EXEC_BODY: usize = MAX_INPUT / 3 * 4 + (1 << 20);

/// Requests longer than [`MAX_BODY`] that are read and handed over at once.
const LONG_AT_ONCE: usize = 32;

/// The longest time in seconds that one request waits for a program's end.
const MAX_WITHIN_S: u32 = 600;

/// How bytes are told in JSON.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Encoding {
    /// As text; bytes that are no UTF-8 are replaced.
    #[default]
    Text,
    /// As they are, in base64.
    Base64,
}

impl Encoding {
    fn encode(self, bytes: &[u8]) -> String {
        match self {
            Self::Text => String::from_utf8_lossy(bytes).into_owned(),
            Self::Base64 => BASE64_STANDARD.encode(bytes),
        }
    }
}

/// A program for a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Its path in the guest.
    pub path: String,
    /// Its arguments.
    #[serde(default)]
    pub args: Vec<String>,
    /// Its standard input, at most 16 MiB.
    #[serde(default)]
    pub input: String,
    /// How `input` is told, and what it prints.
    #[serde(default)]
    pub encoding: Encoding,
    /// Seconds that it may take, at most 600; 60 when left out. It is not ended when it takes
    /// longer.
    pub within_s: Option<u32>,
    /// Answer with its process as soon as it runs; its result is asked for later.
    #[serde(default)]
    pub detach: bool,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Wait {
    /// Seconds to wait for its end, at most 600; 60 when left out.
    within_s: Option<u32>,
    /// How what it printed is told: `text` or `base64`.
    #[serde(default)]
    encoding: Encoding,
}

/// What a program in a guest did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecReply {
    /// Its process in the guest.
    pub pid: u64,
    /// Its exit code; none when a signal ended it, or while it runs.
    pub exit: Option<i64>,
    /// The signal that ended it.
    pub signal: Option<i64>,
    /// What it printed.
    pub stdout: String,
    /// What it printed as errors.
    pub stderr: String,
    /// It printed more of one of them than the 16 MiB that the guest's agent keeps.
    pub truncated: bool,
}

impl ExecReply {
    fn of(pid: u64, o: &GuestOutput, encoding: Encoding) -> Self {
        Self {
            pid,
            exit: o.exit,
            signal: o.signal,
            stdout: encoding.encode(&o.stdout),
            stderr: encoding.encode(&o.stderr),
            truncated: o.truncated,
        }
    }
}

fn limit(within_s: Option<u32>) -> Duration {
    Duration::from_secs(u64::from(within_s.unwrap_or(60).min(MAX_WITHIN_S)))
}

/// A place for a request that is long, before anything of it is read: only for who may make it.
fn place(api: &Api, who: &Who, vm: &str, request: &Request) -> Result<Option<Share>, Fault> {
    let vm = api.controller.finder.vm_for(who, Action::Use, vm)?;
    if request.body().size_hint().upper().is_some_and(|n| n <= MAX_BODY as u64) {
        return Ok(None);
    }
    let place = api.programs.place(vm.tenant.to_string(), api.share(LONG_AT_ONCE), LONG_AT_ONCE);
    place.map(Some).ok_or_else(|| {
        Fault::unavailable("too many programs with long input are handed over right now")
            .hint("come back later")
    })
}

/// Runs a program in the guest, by its agent, and answers when it has ended, wherever the machine
/// is then.
#[utoipa::path(post, path = "/v1/vms/{vm}/exec", request_body = ExecRequest, params(("vm" = String, Path)),
    responses((status = 200, body = ExecReply), (status = 202, body = ExecReply),
    (status = 400, body = Fault), (status = 409, body = Fault), (status = 413, body = Fault),
    (status = 504, body = Fault)))]
pub(super) async fn start(
    State(api): State<Api>,
    who: Who,
    Path(vm): Path<String>,
    request: Request,
) -> Answer<(StatusCode, Json<ExecReply>)> {
    let place = match place(&api, &who, &vm, &request) {
        Ok(place) => place,
        Err(f) => {
            // A sender that is cut off while it sends never reads why.
            let mut body = request.into_body().into_data_stream();
            tokio::spawn(async move { drop_rest(&mut body).await });
            return Err(f.into());
        }
    };
    let Payload(want) = Payload::<ExecRequest, MAX_EXEC_BODY>::from_request(request, &api).await?;
    let input = match want.encoding {
        Encoding::Text => want.input.into_bytes(),
        Encoding::Base64 => BASE64_STANDARD
            .decode(&want.input)
            .map_err(|e| Fault::invalid(format!("the input is not base64: {e}")))?,
    };
    if input.len() > MAX_INPUT {
        return Err(Fault::new(Code::TooLarge, "a program's input is at most 16 MiB").into());
    }
    let within = limit(want.within_s);
    let program = GuestProgram { path: want.path, args: want.args, input: input.into() };
    let process = api.controller.programs.exec(&who, &vm, program, within).await?;
    drop(place);
    if want.detach {
        let reply = ExecReply { pid: process.pid, ..ExecReply::default() };
        return Ok((StatusCode::ACCEPTED, Json(reply)));
    }
    let output = api.controller.programs.exec_wait(&process, within).await?;
    Ok((StatusCode::OK, Json(ExecReply::of(process.pid, &output, want.encoding))))
}

/// Waits until a program that was started in the guest has ended, and tells what it did: once.
#[utoipa::path(get, path = "/v1/vms/{vm}/exec/{pid}",
    params(("vm" = String, Path), ("pid" = u64, Path), Wait),
    responses((status = 200, body = ExecReply), (status = 404, body = Fault),
    (status = 409, body = Fault), (status = 504, body = Fault)))]
pub(super) async fn wait(
    State(api): State<Api>,
    who: Who,
    Path((vm, pid)): Path<(String, u64)>,
    Params(how): Params<Wait>,
) -> Answer<Json<ExecReply>> {
    let process = api.controller.programs.exec_at(&who, &vm, pid)?;
    let output = api.controller.programs.exec_wait(&process, limit(how.within_s)).await?;
    Ok(Json(ExecReply::of(pid, &output, how.encoding)))
}

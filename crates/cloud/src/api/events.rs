//! The change feed as server-sent events.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{Response, Sse, sse};
use futures::Stream;
use godwit_types::{Fault, Name, UnixMs};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};

use super::{Answer, Api, Params, Who};
use crate::access::Principal;
use crate::controller::authorize::visible_part;
use crate::registry::{
    Event, EventId, EventKind, Forgotten, Object, Reader, Summary, Watcher, What,
};

/// In the answer to each reading request: the last event whose change it shows at least. What is
/// followed from there on misses nothing.
pub const REVISION_HEADER: &str = "godwit-revision";

/// The event that says that some were lost: list anew; it goes on from the id that it has.
pub const RESET: &str = "reset";

/// Streams of events that are open at once, in all.
pub const MAX_STREAMS: usize = 256;

/// Those of one user.
pub(super) const MAX_USER_STREAMS: usize = 16;

/// Those of all users, so that an operator always finds room.
const MAX_USERS_STREAMS: usize = 192;

/// How long a stream is silent before it says where it is.
const ALIVE: Duration = Duration::from_secs(15);

/// Which events to send.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EventFilter {
    /// Those after this one; the header `Last-Event-ID` goes before it. From now on when neither is
    /// there.
    pub after: Option<String>,
    /// Only of these kinds, with commas between: `vm`, `substrate`, `site`, `op`.
    pub kind: Option<String>,
    /// Only of objects with this name or id.
    pub name: Option<String>,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FeedEvent {
    /// Which event, as in `Last-Event-ID`.
    pub id: String,
    /// The number of the last change that was written; it never decreases.
    pub revision: u64,
    /// What it is about.
    pub kind: EventKind,
    /// The id of the object; of a site its name.
    pub key: String,
    /// The name of the object; of an operation the one of its target.
    pub name: String,
    /// Whether the object is gone.
    pub deleted: bool,
    /// What it was; none for a new one.
    pub old: Option<Summary>,
    /// What it is; none for one that is gone.
    pub new: Option<Summary>,
    /// The object, as the API shows it: as this change left it, a site as it is now. None when it is
    /// gone, or has changed again in an earlier run of the center.
    #[schema(value_type = Option<Object>)]
    pub record: Option<serde_json::Value>,
}

/// What `reset` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reset {
    /// The last event that there is.
    pub id: String,
    /// Its number.
    pub revision: u64,
}

/// The streams of events of an API.
#[derive(Debug, Clone)]
pub(super) struct Streams {
    all: Arc<Semaphore>,
    users: Arc<Semaphore>,
    /// How many each user has, by its id.
    of_user: Arc<Mutex<HashMap<Name, usize>>>,
}

impl Default for Streams {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(MAX_STREAMS)),
            users: Arc::new(Semaphore::new(MAX_USERS_STREAMS)),
            of_user: Arc::default(),
        }
    }
}

impl Streams {
    fn of_user(&self) -> MutexGuard<'_, HashMap<Name, usize>> {
        self.of_user.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one more stream of `who`.
    fn place(&self, who: &Principal) -> Result<Place, Fault> {
        let full = |n: usize, whose: &str| {
            Fault::unavailable(format!("{n} streams of events{whose} are open already"))
                .hint("close one, or come back later")
        };
        let take = |from: &Arc<Semaphore>| from.clone().try_acquire_owned();
        let mut place = Place { streams: self.clone(), user: None, _taken: Vec::new() };
        if !who.is_operator() {
            let of_users = take(&self.users).map_err(|_| full(MAX_USERS_STREAMS, " of users"))?;
            place._taken.push(of_users);
            let mut all = self.of_user();
            let n = all.entry(who.id.clone()).or_default();
            if *n >= MAX_USER_STREAMS {
                return Err(full(*n, " of yours"));
            }
            *n += 1;
            place.user = Some(who.id.clone());
        }
        place._taken.push(take(&self.all).map_err(|_| full(MAX_STREAMS, ""))?);
        Ok(place)
    }
}

/// The place of an open stream.
#[derive(Debug)]
struct Place {
    streams: Streams,
    user: Option<Name>,
    _taken: Vec<OwnedSemaphorePermit>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(user) = &self.user else { return };
        let mut all = self.streams.of_user();
        if let Some(n) = all.get_mut(user) {
            *n -= 1;
            if *n == 0 {
                all.remove(user);
            }
        }
    }
}

/// Says in each answer to a reading request what the request cannot have missed.
pub(super) async fn say_revision(State(api): State<Api>, request: Request, next: Next) -> Response {
    if request.method() != Method::GET {
        return next.run(request).await;
    }
    // Taken before anything is read: the answer shows all of it, and maybe more.
    let now = api.controller.registry().now().to_string();
    let mut answer = next.run(request).await;
    if answer.status().is_success()
        && let Ok(now) = HeaderValue::from_str(&now)
    {
        answer.headers_mut().insert(REVISION_HEADER, now);
    }
    answer
}

/// Which events pass.
#[derive(Debug)]
struct Filter {
    /// Empty: all.
    kinds: Vec<EventKind>,
    name: Option<String>,
}

impl Filter {
    fn of(f: &EventFilter) -> Result<Self, Fault> {
        let kinds = f.kind.as_deref().unwrap_or_default();
        let kinds = kinds.split(',').filter(|k| !k.is_empty()).map(|word| {
            EventKind::ALL.into_iter().find(|k| k.word() == word).ok_or_else(|| {
                Fault::invalid(format!("'{}' is no kind of event", word.escape_debug()))
                    .hint("there are vm, substrate, site and op")
            })
        });
        Ok(Self { kinds: kinds.collect::<Result<_, _>>()?, name: f.name.clone() })
    }

    fn takes(&self, what: &What) -> bool {
        (self.kinds.is_empty() || self.kinds.contains(&what.kind))
            && self.name.as_ref().is_none_or(|n| *n == what.name || *n == what.key)
    }
}

struct Following {
    api: Api,
    who: Principal,
    reader: Reader,
    watcher: Watcher,
    filter: Filter,
    /// What is said first.
    first: Option<sse::Event>,
    _place: Place,
}

/// What somebody may know of an event.
struct Visible {
    old: Option<Summary>,
    new: Option<Summary>,
}

impl Following {
    /// The next thing to say; none when the center stops or the reader's token is good no more.
    async fn next(&mut self) -> Option<sse::Event> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        let late = Instant::now() + ALIVE;
        loop {
            let next = tokio::time::timeout_at(late, self.watcher.next());
            let next = self.api.stop.run_until_cancelled(next).await?;
            if !self.api.controller.registry().people().still_good(&self.who, UnixMs::now()) {
                return None;
            }
            match next {
                Ok(Ok(event)) if self.filter.takes(&event.what) => {
                    if let Some(visible) = self.visible(&event.what) {
                        return Some(self.sse_event(&event, visible));
                    }
                }
                Ok(Ok(_)) => {}
                Ok(Err(forgotten)) => return Some(reset(forgotten)),
                // Who is told of little goes on from here too.
                Err(_) => return Some(at(self.watcher.last()).comment("alive")),
            }
        }
    }

    /// What of an event is there for whoever reads: what comes into its sight is new, what leaves it
    /// is gone.
    fn visible(&self, what: &What) -> Option<Visible> {
        let (before, now) =
            (self.reader.may_read(&what.seen_before), self.reader.may_read(&what.seen_now));
        let old = what.old.clone().filter(|_| before);
        let new = what.new.clone().filter(|_| now);
        (old.is_some() || new.is_some()).then_some(Visible { old, new })
    }

    fn sse_event(&self, event: &Event, Visible { old, new }: Visible) -> sse::Event {
        let what = &event.what;
        let record = match &what.object {
            _ if new.is_none() => None,
            Some(Object::Substrate(s)) => {
                serde_json::to_value(visible_part(&self.who, s.as_ref().clone())).ok()
            }
            Some(object) => serde_json::to_value(object).ok(),
            None if what.kind == EventKind::Site => {
                let (name, c) = (Name::new(&what.key).ok(), &self.api.controller);
                let site = name.and_then(|n| c.registry().sites().get(&n).ok());
                site.and_then(|s| serde_json::to_value(c.finder.site_for(&self.who, s)).ok())
            }
            None => None,
        };
        let data = FeedEvent {
            id: event.id.to_string(),
            revision: event.id.revision(),
            kind: what.kind,
            key: what.key.clone(),
            name: what.name.clone(),
            deleted: new.is_none(),
            old,
            new,
            record,
        };
        json(at(event.id).event(what.kind.word()), &data)
    }
}

/// Says where the stream is, and nothing else: whoever breaks off goes on from there.
fn at(id: EventId) -> sse::Event {
    sse::Event::default().id(id.to_string())
}

fn json<T: Serialize>(event: sse::Event, data: &T) -> sse::Event {
    // A string cannot fail to become one.
    let text = serde_json::to_string(data).unwrap_or_else(|_| "null".into());
    event.data(text)
}

fn reset(forgotten: Forgotten) -> sse::Event {
    let now = forgotten.now;
    let data = Reset { id: now.to_string(), revision: now.revision() };
    json(at(now).event(RESET), &data)
}

/// What changes in the cloud, as server-sent events: machines, substrates, sites and operations, each
/// change once and in the order in which they came. `event` is the kind, `data` a `FeedEvent`, and
/// `id` what `Last-Event-ID` or `after` takes to go on after that event, also when the center was
/// started again in between. Every answer to a `GET` has such an id in its header
/// `godwit-revision`: a list that is followed from there misses nothing. Some thousand events are
/// kept. When those after an id are not, or it is none of this cloud's history, or a reader was too
/// slow, the event `reset` (`data` a `Reset`) says so: list anew; the stream goes on from its id.
/// The progress and steps of an operation are in its own stream. Whoever asks is told of what it may
/// see, as in the lists: what comes into its sight is new, what leaves it is deleted; the stream ends
/// when its token does. At most 256 streams are open, 16 of one user.
#[utoipa::path(get, path = "/v1/events", params(EventFilter),
    responses((status = 200, content_type = "text/event-stream", body = FeedEvent),
    (status = 400, body = Fault), (status = 503, body = Fault)))]
pub(super) async fn events(
    State(api): State<Api>,
    who: Who,
    headers: HeaderMap,
    Params(f): Params<EventFilter>,
) -> Answer<Sse<impl Stream<Item = Result<sse::Event, Infallible>>>> {
    let filter = Filter::of(&f)?;
    let registry = api.controller.registry();
    let after = match (headers.get("last-event-id"), &f.after) {
        // An id of another version is as good as one that is forgotten.
        (Some(id), _) => id.to_str().ok().map(str::parse),
        (None, Some(id)) => {
            let id = id.parse::<EventId>().map_err(|e| Fault::invalid(format!("after: {e}")))?;
            Some(Ok(id))
        }
        (None, None) => None,
    };
    let created = match who.is_operator() && !who.narrowed {
        // It reads what all have, whatever has become of its own tenant's entry.
        true => UnixMs::default(),
        false => registry.people().tenant(&who.tenant)?.created,
    };
    let reader = Reader::new(&who, created);
    let place = api.streams.place(&who)?;
    let watched = match after {
        None => Ok(registry.watch_now()),
        Some(Ok(id)) => registry.watch(Some(id)),
        Some(Err(_)) => Err(Forgotten { now: registry.now() }),
    };
    let (watcher, first) = match watched {
        Ok(watcher) => {
            let first = at(watcher.last());
            (watcher, first)
        }
        Err(_) => {
            let watcher = registry.watch_now();
            let first = reset(Forgotten { now: watcher.last() });
            (watcher, first)
        }
    };
    let (who, first) = (who.0, Some(first));
    let following = Following { api, who, reader, watcher, filter, first, _place: place };
    let stream = futures::stream::unfold(following, |mut following| async move {
        let event = following.next().await?;
        Some((Ok(event), following))
    });
    Ok(Sse::new(stream))
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, BodyDataStream};
    use axum::http::StatusCode;
    use axum::http::header::AUTHORIZATION;
    use futures::StreamExt;
    use tokio_util::sync::CancellationToken;
    use tower::ServiceExt;

    use super::*;
    use crate::registry::{OpRecord, Registry};

    struct Place {
        _dir: tempfile::TempDir,
        registry: Arc<Registry>,
        router: axum::Router,
        stop: CancellationToken,
    }

    fn place() -> Place {
        let dir = tempfile::tempdir().expect("dir");
        let registry = Arc::new(Registry::open(&dir.path().join("r.redb")).expect("open"));
        let authority = godwit_transfer::Authority::create(&dir.path().join("authority"));
        let authority = Arc::new(authority.expect("authority"));
        let c = crate::controller::Controller::new(registry.clone(), authority);
        let stop = CancellationToken::new();
        let api = Api::new(c, Arc::new(super::super::tests::NoGate), "secret").until(stop.clone());
        Place { _dir: dir, registry, router: super::super::tests::whole(&api), stop }
    }

    impl Place {
        async fn get(&self, path: &str, last: Option<&str>) -> Response {
            self.get_as("secret", None, path, last).await
        }

        async fn get_as(
            &self,
            token: &str,
            tenant: Option<&str>,
            path: &str,
            last: Option<&str>,
        ) -> Response {
            let r = axum::http::Request::get(path);
            let mut r = r.header(AUTHORIZATION, format!("Bearer {token}"));
            if let Some(tenant) = tenant {
                r = r.header(crate::api::TENANT_HEADER, tenant);
            }
            if let Some(id) = last {
                r = r.header("Last-Event-ID", id);
            }
            let r = r.body(Body::empty()).expect("request");
            self.router.clone().oneshot(r).await.expect("answer")
        }

        async fn follow(&self, path: &str, last: Option<&str>) -> BodyDataStream {
            let answer = self.get(path, last).await;
            assert_eq!(answer.status(), StatusCode::OK);
            assert_eq!(answer.headers()["content-type"], "text/event-stream");
            answer.into_body().into_data_stream()
        }

        fn check(&self, site: &str) {
            let site = Name::new(site).expect("name");
            let op =
                OpRecord::begun(&Principal::operator(), crate::ops::OpKind::PoolCheck { site });
            self.registry.ops().put(&op).expect("put");
        }
    }

    async fn frame(s: &mut BodyDataStream) -> String {
        let bytes = s.next().await.expect("goes on").expect("whole");
        String::from_utf8(bytes.to_vec()).expect("text")
    }

    /// Id, kind and data of an event.
    fn parts(frame: &str) -> (String, String, serde_json::Value) {
        let part = |key: &str| {
            let line = frame.lines().find_map(|l| l.strip_prefix(key));
            line.unwrap_or_else(|| panic!("no {key} in {frame}")).trim().to_owned()
        };
        (part("id:"), part("event:"), serde_json::from_str(&part("data:")).expect("JSON"))
    }

    #[tokio::test]
    async fn a_list_is_followed_from_the_id_that_it_came_with() {
        let p = place();
        p.check("early");
        let list = p.get("/v1/ops", None).await;
        let id = list.headers()[REVISION_HEADER].to_str().expect("text").to_owned();
        p.check("cafe");
        p.check("hall");
        let mut s = p.follow(&format!("/v1/events?after={id}"), None).await;
        assert_eq!(frame(&mut s).await, format!("id: {id}\n\n"), "it says at once where it is");
        let (first, kind, data) = parts(&frame(&mut s).await);
        assert_eq!(
            (kind.as_str(), &data["name"], &data["deleted"]),
            ("op", &"cafe".into(), &false.into())
        );
        assert_eq!((&data["id"], &data["revision"]), (&first.as_str().into(), &2.into()));
        assert_eq!(data["new"]["does"], "pool check");
        assert_eq!(data["record"]["state"], "running");
        serde_json::from_value::<FeedEvent>(data).expect("it is read as it is written");
        assert_eq!(parts(&frame(&mut s).await).2["name"], "hall");
        // The header is what a browser adds to the address of before.
        let mut s = p.follow(&format!("/v1/events?after={id}"), Some(&first)).await;
        frame(&mut s).await;
        assert_eq!(parts(&frame(&mut s).await).2["name"], "hall");
        // Filters.
        let query = format!("/v1/events?after={id}&kind=vm,op&name=hall");
        let mut s = p.follow(&query, None).await;
        frame(&mut s).await;
        assert_eq!(parts(&frame(&mut s).await).2["name"], "hall");
        p.stop.cancel();
        assert!(s.next().await.is_none(), "it ends with the center");
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_of_few_events_still_goes_on_from_now() {
        let p = place();
        let mut s = p.follow("/v1/events?kind=vm", None).await;
        let began = frame(&mut s).await;
        p.check("cafe");
        let alive = frame(&mut s).await;
        assert_eq!(alive, format!("id: {}\n: alive\n\n", p.registry.now()));
        assert_ne!(alive, began);
    }

    #[tokio::test]
    async fn an_id_that_is_not_known_begins_anew_and_what_is_no_id_is_refused() {
        let p = place();
        p.check("cafe");
        let unknown = "0000000000000001-1";
        for (path, header) in [
            (format!("/v1/events?after={unknown}"), None),
            ("/v1/events".to_owned(), Some(unknown)),
            ("/v1/events".to_owned(), Some("of another version")),
        ] {
            let mut s = p.follow(&path, header).await;
            let (id, kind, data) = parts(&frame(&mut s).await);
            assert_eq!((kind.as_str(), &id), (RESET, &p.registry.now().to_string()));
            let found: Reset = serde_json::from_value(data).expect("reset");
            assert_eq!(found, Reset { id, revision: p.registry.now().revision() });
            p.check("hall");
            assert_eq!(parts(&frame(&mut s).await).2["name"], "hall", "and goes on from there");
        }
        for bad in ["after=7", "kind=vms", "kin=vm"] {
            let answer = p.get(&format!("/v1/events?{bad}"), None).await;
            assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{bad}");
        }
    }

    #[tokio::test]
    async fn streams_are_limited_in_number_and_one_that_ends_makes_room() {
        let p = place();
        let mut open = Vec::new();
        for _ in 0..MAX_STREAMS {
            open.push(p.follow("/v1/events", None).await);
        }
        let full = p.get("/v1/events", None).await;
        assert_eq!(full.status(), StatusCode::SERVICE_UNAVAILABLE);
        open.pop();
        open.push(p.follow("/v1/events", None).await);
    }

    /// A token of a new user.
    fn user(p: &Place, tenant: &str, n: &str) -> String {
        let (me, tenant) = (Principal::operator(), Name::new(tenant).expect("name"));
        if p.registry.people().tenant(&tenant).is_err() {
            let made = crate::registry::TenantRecord::new(tenant.clone());
            p.registry.people().tenant_add(&me, &made).expect("tenant");
        }
        let (n, role) = (Name::new(n).expect("name"), crate::access::Role::Viewer);
        let user = p.registry.people().user_add(&me, &tenant, &n, role).expect("user");
        let drawn = crate::registry::Drawn::new(user.id, role, None);
        p.registry.people().token_add(&me, &drawn.record).expect("token");
        drawn.text
    }

    fn stopped(p: &Place, tenant: &str, n: &str) -> OpRecord {
        let who = Principal::operator().at(&Name::new(tenant).expect("name"));
        let (vm, name) = (godwit_types::VmId::new(), Name::new(n).expect("name"));
        let op = OpRecord::begun(&who, crate::ops::OpKind::VmStop { vm, name });
        p.registry.ops().put(&op).expect("put");
        op
    }

    /// What a stream tells up to the operation `mark`: kind, name and whether it is new or gone.
    async fn events_until(s: &mut BodyDataStream, mark: &str) -> Vec<String> {
        let mut all = Vec::new();
        loop {
            let frame = frame(s).await;
            if !frame.contains("event:") {
                continue;
            }
            let (_, kind, data) = parts(&frame);
            let name = data["name"].as_str().expect("a name");
            if name == mark {
                return all;
            }
            let how = match (data["old"].is_null(), data["deleted"] == true) {
                (_, true) => "gone",
                (true, false) => "new",
                (false, false) => "changed",
            };
            assert_eq!(data["record"].is_null(), how == "gone", "{data}");
            all.push(format!("{kind} {name} {how}"));
        }
    }

    #[tokio::test]
    async fn each_reader_gets_the_events_it_may_see_and_no_other() {
        use godwit_types::SubstrateKind::{Private, Public, Restricted};
        let p = place();
        let (ann, bob) = (user(&p, "acme", "ann"), user(&p, "other", "bob"));
        let me = Principal::operator();
        let name = |n: &str| Name::new(n).expect("name");
        let from = p.registry.now().to_string();
        let mut live =
            p.get_as(&ann, None, "/v1/events", None).await.into_body().into_data_stream();
        // One of each, of both tenants and of the cloud.
        stopped(&p, "acme", "ours");
        stopped(&p, "other", "theirs");
        p.check("pool");
        let s = |n: &str, tenant: &str, kind| crate::registry::SubstrateRecord {
            tenant: name(tenant),
            kind,
            ..crate::registry::tests::substrate(n)
        };
        let lent = s("lent", "other", Restricted);
        p.registry.substrate_add(&lent).expect("added");
        p.registry.substrate_add(&s("mine", "acme", Private)).expect("added");
        p.registry.substrate_add(&s("clean", "default", Public)).expect("added");
        // A grant brings it into sight, and its end takes it out.
        p.registry.substrate_grant(&me, lent.id, &name("acme"), true).expect("granted");
        p.registry.substrate_holder(lent.id, &name("cafe"), true).expect("held");
        p.registry.substrate_grant(&me, lent.id, &name("acme"), false).expect("taken back");
        p.registry.substrate_holder(lent.id, &name("hall"), true).expect("held");
        // A tenant of that name that was before is another.
        p.registry
            .people()
            .tenant_add(&me, &crate::registry::TenantRecord::new(name("third")))
            .expect("made");
        let mut old = stopped(&p, "third", "old");
        old.state = godwit_types::OpState::Done;
        p.registry.ops().put(&old).expect("ended");
        p.registry.people().tenant_remove(&me, &name("third")).expect("removed");
        let eve = user(&p, "third", "eve");
        for tenant in ["acme", "other", "third"] {
            stopped(&p, tenant, "end");
        }
        let ours = [
            "op ours new",
            "substrate mine new",
            "substrate clean new",
            "substrate lent new",
            "substrate lent changed",
            "substrate lent gone",
        ];
        assert_eq!(events_until(&mut live, "end").await, ours);
        let theirs = [
            "op theirs new",
            "substrate lent new",
            "substrate clean new",
            "substrate lent changed",
            "substrate lent changed",
            "substrate lent changed",
            "substrate lent changed",
        ];
        let path = format!("/v1/events?after={from}");
        for (token, tenant, wanted) in [
            (ann.as_str(), None, &ours[..]),
            (&bob, None, &theirs),
            (&eve, None, &["substrate clean new"]),
            ("secret", Some("acme"), &ours),
        ] {
            let answer = p.get_as(token, tenant, &path, None).await;
            let mut s = answer.into_body().into_data_stream();
            assert_eq!(events_until(&mut s, "end").await, wanted, "{tenant:?}");
        }
        let mut s = p.follow(&path, None).await;
        let all = events_until(&mut s, "end").await;
        for there in ["op pool new", "op old new", "op old gone", "substrate mine new"] {
            assert!(all.iter().any(|e| e == there), "{there}: {all:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_ends_with_the_token_that_opened_it_and_each_user_has_so_many() {
        let p = place();
        let ann = user(&p, "acme", "ann");
        let open = async |token: &str| p.get_as(token, None, "/v1/events", None).await;
        let mut streams = Vec::new();
        for _ in 0..MAX_USER_STREAMS {
            let answer = open(&ann).await;
            assert_eq!(answer.status(), StatusCode::OK);
            streams.push(answer.into_body().into_data_stream());
        }
        assert_eq!(open(&ann).await.status(), StatusCode::SERVICE_UNAVAILABLE);
        let bob = user(&p, "acme", "bob");
        assert_eq!(open(&bob).await.status(), StatusCode::OK, "another user has its own");
        drop(streams.pop());
        assert_eq!(open(&ann).await.status(), StatusCode::OK);
        let token = p.registry.people().tokens().into_iter().find(|t| t.user.as_str() == "ann");
        p.registry
            .people()
            .token_remove(&Principal::operator(), &token.expect("there").id)
            .expect("gone");
        let mut s = streams.pop().expect("open");
        frame(&mut s).await;
        stopped(&p, "acme", "after");
        assert!(s.next().await.is_none(), "nothing is told to whoever has no token any more");
        // Also when nothing happens.
        let mut s = streams.pop().expect("open");
        frame(&mut s).await;
        assert!(s.next().await.is_none());
    }
}

//! Leader election among the replicas, by a Lease (`coordination.k8s.io`).
//!
//! [`Elector`] maintains a [`Leadership`]: whether this replica leads, and until when. [`next_step`] is the pure
//! decision. The Lease is written with its resource version, so of two concurrent attempts one fails. Clocks of
//! different hosts are never compared: a Lease counts as expired when this replica has observed it unchanged for its
//! whole duration (as client-go does).

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

/// Duration of a Lease without renewal.
pub(crate) const LEASE: Duration = Duration::from_secs(15);
/// A leader that cannot renew the Lease for this time stops writing, well before another replica may start.
pub(crate) const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Delay between two attempts, without jitter.
pub(crate) const RETRY: Duration = Duration::from_secs(2);

const SHORTEST_ATTEMPT: Duration = Duration::from_millis(100);

/// The Lease could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The API server rejected the request, or is unreachable.
    #[error("cannot {verb} Lease {name}: {source} ({})", likely_cause(.source))]
    Api {
        /// The attempted operation.
        verb: &'static str,
        /// Name of the Lease.
        name: String,
        /// Error of the client.
        source: Box<kube::Error>,
    },
    /// The API server did not respond in time.
    #[error("no response about Lease {name} within {} s", RENEW_DEADLINE.as_secs())]
    Timeout {
        /// Name of the Lease.
        name: String,
    },
}

fn likely_cause(error: &kube::Error) -> &'static str {
    match error {
        kube::Error::Api(status) if status.is_forbidden() => "RBAC does not allow it; apply deploy/rbac.yaml",
        kube::Error::Api(_) => "the API server rejected the request",
        _ => "check that the API server is reachable",
    }
}

/// Next step of the election.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// This replica holds the Lease: renew it.
    Renew,
    /// The Lease is free or expired: take it.
    Take,
    /// A different replica holds the Lease: wait.
    Wait,
}

/// Last observed Lease, and the time since when it is unchanged.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ObservedLease {
    spec: LeaseSpec,
    since: Instant,
}

impl ObservedLease {
    /// Updates the observation with the present Lease.
    pub(crate) fn next(before: Option<Self>, spec: &LeaseSpec, now: Instant) -> Self {
        match before {
            Some(observed) if observed.spec == *spec => observed,
            _ => Self { spec: spec.clone(), since: now },
        }
    }
}

/// Returns the next step of replica `me`.
pub(crate) fn next_step(observed: &ObservedLease, me: &str, now: Instant) -> Step {
    let holder = observed.spec.holder_identity.as_deref().unwrap_or_default();
    let seconds = observed.spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
    let lasts = seconds.map_or(LEASE, Duration::from_secs);
    if holder == me {
        Step::Renew
    } else if holder.is_empty() || now.saturating_duration_since(observed.since) >= lasts {
        Step::Take
    } else {
        Step::Wait
    }
}

/// Returns the Lease after `step`.
pub(crate) fn claimed(spec: &LeaseSpec, me: &str, step: Step, now: Timestamp) -> LeaseSpec {
    let taken = step == Step::Take;
    LeaseSpec {
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: i32::try_from(LEASE.as_secs()).ok(),
        renew_time: Some(MicroTime(now)),
        acquire_time: if taken { Some(MicroTime(now)) } else { spec.acquire_time.clone() },
        lease_transitions: Some(spec.lease_transitions.unwrap_or(0).saturating_add(i32::from(taken))),
        ..spec.clone()
    }
}

/// The state of this replica's leadership. Writers check it before each write.
///
/// A suspended process (SIGSTOP, a paused container) may resume after its Lease expired, and a pending write would
/// precede the next attempt of the elector. The leadership therefore has an end, which writers compare with the clock.
/// If the process is suspended between that check and the write, the resource version protects: the API server rejects
/// the write if the object changed since the decision. The clock is CLOCK_MONOTONIC, which advances while a process is
/// suspended, but not while the whole machine is; then only the resource versions protect.
#[derive(Clone, Debug)]
pub(crate) struct Leadership {
    /// True if this replica leads according to its last attempt.
    pub(crate) leads: watch::Receiver<bool>,
    until: watch::Receiver<Option<Instant>>,
}

impl Leadership {
    /// True while no other replica may write.
    pub(crate) fn is_valid(&self) -> bool {
        *self.leads.borrow() && self.until.borrow().is_some_and(|until| Instant::now() < until)
    }
}

/// Takes part in the election on behalf of this replica.
pub(crate) struct Elector {
    api: Api<Lease>,
    name: String,
    me: String,
    leads: watch::Sender<bool>,
    until: watch::Sender<Option<Instant>>,
    observed: Option<ObservedLease>,
    renewed: Option<Instant>,
}

impl Elector {
    /// Creates an elector and the leadership state that it updates.
    pub(crate) fn new(client: Client, namespace: &str, name: &str, me: &str) -> (Self, Leadership) {
        let (leads, leads_receiver) = watch::channel(false);
        let (until, until_receiver) = watch::channel(None);
        let api = Api::namespaced(client, namespace);
        let elector =
            Self { api, name: name.to_owned(), me: me.to_owned(), leads, until, observed: None, renewed: None };
        (elector, Leadership { leads: leads_receiver, until: until_receiver })
    }

    /// Takes part until `stop` is cancelled, then releases the Lease, so that the next leader need not wait
    /// until it expires.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        loop {
            // The deadline also bounds a hanging attempt: a leader must detect in time that it no longer leads.
            let limit = self.left().max(SHORTEST_ATTEMPT);
            let started = Instant::now();
            let outcome = tokio::select! {
                outcome = timeout(limit, self.attempt()) => outcome.unwrap_or_else(|_| Err(Error::Timeout { name: self.name.clone() })),
                () = stop.cancelled() => break,
            };
            self.account(outcome, started);
            tokio::select! {
                () = tokio::time::sleep(jittered(RETRY).min(self.left())) => {}
                () = stop.cancelled() => break,
            }
        }
        self.release().await;
    }

    // Time until the deadline; the full period for a replica that does not lead.
    fn left(&self) -> Duration {
        self.renewed.map_or(RENEW_DEADLINE, |at| RENEW_DEADLINE.saturating_sub(at.elapsed()))
    }

    async fn attempt(&mut self) -> Result<bool, Error> {
        let Some(mut lease) = self.api.get_opt(&self.name).await.map_err(|e| self.error("get", e))? else {
            return self.create().await;
        };
        let spec = lease.spec.unwrap_or_default();
        let now = Instant::now();
        let observed = ObservedLease::next(self.observed.take(), &spec, now);
        let step = next_step(&observed, &self.me, now);
        self.observed = Some(observed);
        if step == Step::Wait {
            return Ok(false);
        }
        lease.spec = Some(claimed(&spec, &self.me, step, Timestamp::now()));
        match self.api.replace(&self.name, &PostParams::default(), &lease).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.is_conflict() => Ok(false),
            Err(e) => Err(self.error("update", e)),
        }
    }

    async fn create(&self) -> Result<bool, Error> {
        let spec = claimed(&LeaseSpec::default(), &self.me, Step::Take, Timestamp::now());
        let lease =
            Lease { metadata: ObjectMeta { name: Some(self.name.clone()), ..Default::default() }, spec: Some(spec) };
        match self.api.create(&PostParams::default(), &lease).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.is_already_exists() || status.is_conflict() => Ok(false),
            Err(e) => Err(self.error("create", e)),
        }
    }

    // Time counts from the start of the attempt: the API server may have renewed the Lease then, and other replicas
    // count from that time.
    fn account(&mut self, outcome: Result<bool, Error>, started: Instant) {
        let leads = match outcome {
            Ok(true) => {
                self.renewed = Some(started);
                true
            }
            Ok(false) => false,
            Err(e) => {
                let leads = *self.leads.borrow() && self.renewed.is_some_and(|at| at.elapsed() < RENEW_DEADLINE);
                tracing::warn!(error = %e, still_leading = leads, "leader election failed; retrying");
                leads
            }
        };
        if !leads {
            self.renewed = None;
        }
        self.until.send_replace(self.renewed.map(|at| at + RENEW_DEADLINE));
        let changed = self.leads.send_if_modified(|now| std::mem::replace(now, leads) != leads);
        if changed {
            let holder = self.observed.as_ref().and_then(|s| s.spec.holder_identity.clone()).unwrap_or_default();
            if leads {
                tracing::info!(identity = %self.me, "leading");
            } else {
                tracing::warn!(identity = %self.me, %holder, "no longer leading");
            }
        }
    }

    async fn release(&mut self) {
        self.until.send_replace(None);
        if !self.leads.send_replace(false) {
            return;
        }
        let released = async {
            let mut lease = self.api.get(&self.name).await?;
            let Some(spec) = lease.spec.as_mut().filter(|s| s.holder_identity.as_deref() == Some(&self.me)) else {
                return Ok(());
            };
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            spec.renew_time = Some(MicroTime(Timestamp::now()));
            self.api.replace(&self.name, &PostParams::default(), &lease).await.map(drop)
        };
        match timeout(RETRY, released).await {
            Ok(Ok(())) => tracing::info!("released the Lease"),
            Ok(Err(e)) => {
                tracing::warn!(error = %e, "cannot release the Lease; the next leader waits until it expires");
            }
            Err(_) => tracing::warn!("cannot release the Lease in time; the next leader waits until it expires"),
        }
    }

    fn error(&self, verb: &'static str, source: kube::Error) -> Error {
        Error::Api { verb, name: self.name.clone(), source: Box::new(source) }
    }
}

/// Adds up to 20 % to `base`, so that replicas that started together do not send their requests together.
pub(crate) fn jittered(base: Duration) -> Duration {
    base + base.mul_f64(fastrand::f64() / 5.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: &str) -> LeaseSpec {
        LeaseSpec { holder_identity: Some(holder.to_owned()), lease_duration_seconds: Some(15), ..Default::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn lease_is_taken_only_after_its_whole_duration_without_a_change() {
        let observed = ObservedLease::next(None, &held_by("other"), Instant::now());
        assert_eq!(next_step(&observed, "me", Instant::now()), Step::Wait);
        tokio::time::advance(Duration::from_secs(14)).await;
        assert_eq!(next_step(&observed, "me", Instant::now()), Step::Wait);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(next_step(&observed, "me", Instant::now()), Step::Take);
    }

    #[tokio::test(start_paused = true)]
    async fn renewal_restarts_the_duration_regardless_of_the_other_clock() {
        let mut spec = held_by("other");
        let observed = ObservedLease::next(None, &spec, Instant::now());
        tokio::time::advance(Duration::from_secs(14)).await;
        // The holder's clock is far behind: only the fact of the change counts.
        spec.renew_time = Timestamp::from_second(1).ok().map(MicroTime);
        let observed = ObservedLease::next(Some(observed), &spec, Instant::now());
        tokio::time::advance(Duration::from_secs(14)).await;
        assert_eq!(next_step(&observed, "me", Instant::now()), Step::Wait);
    }

    #[tokio::test(start_paused = true)]
    async fn released_lease_is_taken_at_once_and_an_own_lease_is_renewed() {
        let now = Instant::now();
        assert_eq!(next_step(&ObservedLease::next(None, &held_by(""), now), "me", now), Step::Take);
        assert_eq!(next_step(&ObservedLease::next(None, &held_by("me"), now), "me", now), Step::Renew);
    }

    #[tokio::test(start_paused = true)]
    async fn leadership_ends_by_the_clock() {
        let client = Client::try_from(kube::Config::new(http_uri())).expect("a client that is never used");
        let (mut elector, leadership) = Elector::new(client, "ns", "lease", "me");
        assert!(!leadership.is_valid());
        elector.account(Ok(true), Instant::now());
        assert!(leadership.is_valid());
        // The process is suspended, including its elector.
        tokio::time::advance(Duration::from_secs(30)).await;
        assert!(*leadership.leads.borrow() && !leadership.is_valid());
        // A renewal that was in progress counts from its start.
        elector.account(Ok(true), Instant::now() - Duration::from_secs(12));
        assert!(!leadership.is_valid());
        elector.account(Ok(true), Instant::now());
        assert!(leadership.is_valid());
        elector.account(Ok(false), Instant::now());
        assert!(!leadership.is_valid());
    }

    fn http_uri() -> hyper::Uri {
        hyper::Uri::from_static("http://127.0.0.1:9")
    }

    #[test]
    fn only_takeovers_count_as_transitions() {
        let now = Timestamp::UNIX_EPOCH;
        let taken = claimed(&LeaseSpec { lease_transitions: Some(3), ..held_by("other") }, "me", Step::Take, now);
        assert_eq!((taken.lease_transitions, taken.holder_identity.as_deref()), (Some(4), Some("me")));
        let renewed = claimed(&taken, "me", Step::Renew, Timestamp::from_second(5).expect("a small number"));
        assert_eq!((renewed.lease_transitions, renewed.acquire_time), (Some(4), Some(MicroTime(now))));
    }

    #[test]
    fn leader_stops_before_another_replica_may_start() {
        // The last attempt may start at the deadline and hang.
        assert!(RENEW_DEADLINE + SHORTEST_ATTEMPT < LEASE);
    }
}

//! Who writes: leader election among the replicas by a Lease (`coordination.k8s.io`).
//!
//! Gives a [`Mandate`]: whether this replica leads, and until when. The decision is [`judge`], pure; the loop around it reads and writes the Lease with
//! the resource version as the guard, so of two that try at once one loses. Clocks of two hosts are never compared: a Lease counts as
//! run out when *we* have seen it unchanged for as long as it was meant to last (as client-go does).

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

/// How long a Lease holds without being renewed.
pub const LEASE: Duration = Duration::from_secs(15);
/// A leader that could not renew for so long stops writing: well before anybody else may start.
pub const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Between two attempts (plus jitter).
pub const RETRY: Duration = Duration::from_secs(2);

const SHORTEST_ATTEMPT: Duration = Duration::from_millis(100);

/// Why a Lease could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server said no.
    #[error("{verb} Lease {name}: {source} ({})", likely_cause(.source))]
    Api {
        /// What was tried.
        verb: &'static str,
        /// On which Lease.
        name: String,
        /// What came back.
        source: Box<kube::Error>,
    },
    /// The API server said nothing.
    #[error("Lease {name}: no answer within {} s", RENEW_DEADLINE.as_secs())]
    Timeout {
        /// Which Lease.
        name: String,
    },
}

fn likely_cause(error: &kube::Error) -> &'static str {
    match error {
        kube::Error::Api(status) if status.is_forbidden() => "RBAC does not allow it: see deploy/rbac.yaml",
        kube::Error::Api(_) => "the API server refused it",
        _ => "is the API server up, and can it be reached from here?",
    }
}

/// What to do about a Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It is ours: renew it.
    Renew,
    /// It is free: take it.
    Take,
    /// It is somebody else's.
    Wait,
}

/// A Lease as it was last seen, and since when it has not changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    spec: LeaseSpec,
    since: Instant,
}

impl Seen {
    /// Updates what was seen before by what is there now.
    pub fn next(before: Option<Self>, spec: &LeaseSpec, now: Instant) -> Self {
        match before {
            Some(seen) if seen.spec == *spec => seen,
            _ => Self { spec: spec.clone(), since: now },
        }
    }
}

/// What `me` should do about the Lease at `now`.
pub fn judge(seen: &Seen, me: &str, now: Instant) -> Step {
    let holder = seen.spec.holder_identity.as_deref().unwrap_or_default();
    let seconds = seen.spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
    let lasts = seconds.map_or(LEASE, Duration::from_secs);
    if holder == me {
        Step::Renew
    } else if holder.is_empty() || now.saturating_duration_since(seen.since) >= lasts {
        Step::Take
    } else {
        Step::Wait
    }
}

/// The Lease after `step`.
pub fn claimed(spec: &LeaseSpec, me: &str, step: Step, now: Timestamp) -> LeaseSpec {
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

/// The right to write, as far as a Lease can give it: held by whoever writes, and asked before each write.
///
/// A process that was stopped (SIGSTOP, a paused container) and goes on does not know how long it was away until its elector has asked;
/// what was about to write would do so first. So the end of the right is a time, and a writer looks at the clock. What is left is a stop
/// between that look and the write: the write then carries the version of the object that the decision rests on, and is refused if
/// anybody has written since. (The clock is CLOCK_MONOTONIC: it runs while a process is stopped. It stands while the whole machine is
/// suspended, and then the versions alone protect.)
#[derive(Clone, Debug)]
pub struct Mandate {
    /// This replica leads, as far as it knows.
    pub leads: watch::Receiver<bool>,
    until: watch::Receiver<Option<Instant>>,
}

impl Mandate {
    /// True while nobody else may write.
    pub fn holds(&self) -> bool {
        *self.leads.borrow() && self.until.borrow().is_some_and(|until| Instant::now() < until)
    }
}

/// One replica's part in the election.
pub struct Elector {
    api: Api<Lease>,
    name: String,
    me: String,
    leads: watch::Sender<bool>,
    until: watch::Sender<Option<Instant>>,
    seen: Option<Seen>,
    renewed: Option<Instant>,
}

// === impl Elector ===

impl Elector {
    /// An elector, and the mandate that it gives and takes (held by those who write).
    pub fn new(client: Client, namespace: &str, name: &str, me: &str) -> (Self, Mandate) {
        let (leads, leads_receiver) = watch::channel(false);
        let (until, until_receiver) = watch::channel(None);
        let api = Api::namespaced(client, namespace);
        let elector = Self { api, name: name.to_owned(), me: me.to_owned(), leads, until, seen: None, renewed: None };
        (elector, Mandate { leads: leads_receiver, until: until_receiver })
    }

    /// Takes part until `stop`, then gives the Lease back, so the next one need not wait for it to run out.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            // The deadline also bounds an attempt that hangs: a leader must know in time that it no longer is.
            let patience = self.left().max(SHORTEST_ATTEMPT);
            let started = Instant::now();
            let outcome = tokio::select! {
                outcome = timeout(patience, self.attempt()) => outcome.unwrap_or_else(|_| Err(Error::Timeout { name: self.name.clone() })),
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

    // Until the deadline; all of it for one who does not lead.
    fn left(&self) -> Duration {
        self.renewed.map_or(RENEW_DEADLINE, |at| RENEW_DEADLINE.saturating_sub(at.elapsed()))
    }

    async fn attempt(&mut self) -> Result<bool, Error> {
        let Some(mut lease) = self.api.get_opt(&self.name).await.map_err(|e| self.error("get", e))? else {
            return self.create().await;
        };
        let spec = lease.spec.unwrap_or_default();
        let now = Instant::now();
        let seen = Seen::next(self.seen.take(), &spec, now);
        let step = judge(&seen, &self.me, now);
        self.seen = Some(seen);
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
        let lease = Lease { metadata: ObjectMeta { name: Some(self.name.clone()), ..Default::default() }, spec: Some(spec) };
        match self.api.create(&PostParams::default(), &lease).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.is_already_exists() || status.is_conflict() => Ok(false),
            Err(e) => Err(self.error("create", e)),
        }
    }

    // Counts from when the attempt began: the server may have renewed the Lease then, and others count from there.
    fn account(&mut self, outcome: Result<bool, Error>, started: Instant) {
        let leads = match outcome {
            Ok(true) => {
                self.renewed = Some(started);
                true
            }
            Ok(false) => false,
            Err(e) => {
                let leads = *self.leads.borrow() && self.renewed.is_some_and(|at| at.elapsed() < RENEW_DEADLINE);
                tracing::warn!(error = %e, still_leading = leads, "leader election");
                leads
            }
        };
        if !leads {
            self.renewed = None;
        }
        self.until.send_replace(self.renewed.map(|at| at + RENEW_DEADLINE));
        let changed = self.leads.send_if_modified(|now| std::mem::replace(now, leads) != leads);
        if changed {
            let holder = self.seen.as_ref().and_then(|s| s.spec.holder_identity.clone()).unwrap_or_default();
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
            Ok(Ok(())) => tracing::info!("gave the Lease back"),
            Ok(Err(e)) => {
                tracing::warn!(error = %e, "could not give the Lease back: the next leader waits until it runs out")
            }
            Err(_) => tracing::warn!("could not give the Lease back in time: the next leader waits until it runs out"),
        }
    }

    fn error(&self, verb: &'static str, source: kube::Error) -> Error {
        Error::Api { verb, name: self.name.clone(), source: Box::new(source) }
    }
}

/// `base` plus up to a fifth, so that replicas that started together do not ask together.
pub fn jittered(base: Duration) -> Duration {
    // RandomState is seeded by the system: random enough for this, and no dependency.
    let random = RandomState::new().build_hasher().finish() % 200;
    base + base * u32::try_from(random).unwrap_or(0) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: &str) -> LeaseSpec {
        LeaseSpec { holder_identity: Some(holder.to_owned()), lease_duration_seconds: Some(15), ..Default::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_taken_only_when_it_has_stood_still_for_its_whole_time() {
        let seen = Seen::next(None, &held_by("other"), Instant::now());
        assert_eq!(judge(&seen, "me", Instant::now()), Step::Wait);
        tokio::time::advance(Duration::from_secs(14)).await;
        assert_eq!(judge(&seen, "me", Instant::now()), Step::Wait);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(judge(&seen, "me", Instant::now()), Step::Take);
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewal_starts_the_time_anew_whatever_the_other_clock_says() {
        let mut spec = held_by("other");
        let seen = Seen::next(None, &spec, Instant::now());
        tokio::time::advance(Duration::from_secs(14)).await;
        // An hour behind: only that it changed counts.
        spec.renew_time = Timestamp::from_second(1).ok().map(MicroTime);
        let seen = Seen::next(Some(seen), &spec, Instant::now());
        tokio::time::advance(Duration::from_secs(14)).await;
        assert_eq!(judge(&seen, "me", Instant::now()), Step::Wait);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_given_back_is_taken_at_once_and_our_own_is_renewed() {
        let now = Instant::now();
        assert_eq!(judge(&Seen::next(None, &held_by(""), now), "me", now), Step::Take);
        assert_eq!(judge(&Seen::next(None, &held_by("me"), now), "me", now), Step::Renew);
    }

    #[tokio::test(start_paused = true)]
    async fn a_mandate_ends_by_the_clock_also_if_nobody_takes_it() {
        let client = Client::try_from(kube::Config::new(http_uri())).expect("a client that is never used");
        let (mut elector, mandate) = Elector::new(client, "ns", "lease", "me");
        assert!(!mandate.holds());
        elector.account(Ok(true), Instant::now());
        assert!(mandate.holds());
        // The process is stopped, and its elector with it.
        tokio::time::advance(Duration::from_secs(30)).await;
        assert!(*mandate.leads.borrow() && !mandate.holds());
        // A renewal that was on its way when it was stopped counts from when it began.
        elector.account(Ok(true), Instant::now() - Duration::from_secs(12));
        assert!(!mandate.holds());
        elector.account(Ok(true), Instant::now());
        assert!(mandate.holds());
        elector.account(Ok(false), Instant::now());
        assert!(!mandate.holds());
    }

    fn http_uri() -> hyper::Uri {
        hyper::Uri::from_static("http://127.0.0.1:9")
    }

    #[test]
    fn transitions_count_takeovers_and_not_renewals() {
        let now = Timestamp::UNIX_EPOCH;
        let taken = claimed(&LeaseSpec { lease_transitions: Some(3), ..held_by("other") }, "me", Step::Take, now);
        assert_eq!((taken.lease_transitions, taken.holder_identity.as_deref()), (Some(4), Some("me")));
        let renewed = claimed(&taken, "me", Step::Renew, Timestamp::from_second(5).expect("a small number"));
        assert_eq!((renewed.lease_transitions, renewed.acquire_time), (Some(4), Some(MicroTime(now))));
    }

    #[test]
    fn a_leader_stops_before_another_may_start() {
        // The last attempt begins at the deadline and may hang.
        assert!(RENEW_DEADLINE + SHORTEST_ATTEMPT < LEASE);
    }
}

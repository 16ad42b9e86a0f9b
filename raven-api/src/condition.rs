//! Condition types and reasons, as they stand in `status.conditions`. The words are part of the API: scripts match on them.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Condition types of a Gateway or GatewayNode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConditionType {
    /// The whole thing works as far as its writer can tell; else the message says what is missing.
    Ready,
    /// Enough gateway nodes are elected.
    Elected,
    /// Everything that the resource claims was accepted; false names what was refused, and why.
    Accepted,
    /// Of a GatewayNode that dials: its tunnel has a session with another pool; false after a while without, absent in between.
    TunnelConnected,
    /// Of an edge's GatewayNode: its proxy has a tunnel to the cloud; likewise.
    ProxyConnected,
}

impl ConditionType {
    /// As it stands in the status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Elected => "Elected",
            Self::Accepted => "Accepted",
            Self::TunnelConnected => "TunnelConnected",
            Self::ProxyConnected => "ProxyConnected",
        }
    }
}

/// A condition before it has a transition time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Which condition.
    pub type_: ConditionType,
    /// True or false. (We never say Unknown.)
    pub ok: bool,
    /// CamelCase, stable.
    pub reason: &'static str,
    /// For a person: which object, what is wrong, what to do.
    pub message: String,
}

/// `verdicts` as conditions. The transition time of one that has not changed its status is kept from `old`, so an
/// unchanged status is byte for byte the same and applying it again is no write.
pub fn merge(old: &[Condition], verdicts: &[Verdict], generation: Option<i64>, now: Timestamp) -> Vec<Condition> {
    verdicts
        .iter()
        .map(|v| {
            let status = if v.ok { "True" } else { "False" };
            let since = old
                .iter()
                .find(|c| c.type_ == v.type_.as_str() && c.status == status)
                .map_or(Time(now), |c| c.last_transition_time.clone());
            Condition {
                type_: v.type_.as_str().to_owned(),
                status: status.to_owned(),
                reason: v.reason.to_owned(),
                message: v.message.clone(),
                observed_generation: generation,
                last_transition_time: since,
            }
        })
        .collect()
}

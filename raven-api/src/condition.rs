//! Condition types in `status.conditions` of Gateways and GatewayNodes. The words are part of the API: scripts
//! match on them.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Condition types of a Gateway or GatewayNode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConditionType {
    /// The object works, as far as its writer can observe; the message lists what is missing.
    Ready,
    /// Gateway: enough gateway nodes are elected.
    Elected,
    /// Gateway: every claim is accepted; when false, the message lists each refused claim with the reason.
    Accepted,
    /// GatewayNode of an edge: its tunnel has a session with another pool. False after a period without one,
    /// absent before that.
    TunnelConnected,
    /// GatewayNode of an edge: its proxy has a connection to the cloud. False after a period without one,
    /// absent before that.
    ProxyConnected,
}

impl ConditionType {
    /// Value of the condition's `type` field.
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

/// A condition without its transition time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Type of the condition.
    pub type_: ConditionType,
    /// Status: True or False. Raven never writes Unknown.
    pub ok: bool,
    /// Reason in CamelCase; part of the API.
    pub reason: &'static str,
    /// Message for users: the object, the problem and the remedy.
    pub message: String,
}

/// Converts verdicts to conditions.
///
/// A condition whose status is unchanged keeps its transition time from `old`. An unchanged status is therefore
/// identical byte for byte, and applying it again writes nothing.
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

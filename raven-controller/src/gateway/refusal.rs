//! Claims of a Gateway that are refused.

use super::facts::GatewayName;

/// A claim that a Gateway makes and that is not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Reason in CamelCase; part of the API.
    pub(crate) reason: &'static str,
    /// Message for users: the object, the problem and the remedy.
    pub(crate) message: String,
    /// Event for the Gateway that holds what was claimed.
    pub(crate) notice: Option<Notice>,
}

/// Event for a Gateway that holds what another Gateway claims. It keeps its claim, so its own conditions do not
/// mention the conflict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Notice {
    /// Gateway that the Event is about.
    pub(crate) to: GatewayName,
    /// Reason in CamelCase; part of the API.
    pub(crate) reason: &'static str,
    /// Message for users: the claim, the claimant and the remedy.
    pub(crate) note: String,
}

impl Refusal {
    /// Creates a refusal that concerns the claimant only.
    pub(crate) fn new(reason: &'static str, message: String) -> Self {
        Self { reason, message, notice: None }
    }

    /// Adds an Event for another Gateway.
    pub(crate) fn with_notice(self, notice: Notice) -> Self {
        Self { notice: Some(notice), ..self }
    }
}

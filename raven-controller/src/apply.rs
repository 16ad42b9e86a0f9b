//! Writes decisions to the API server: Gateways of pool rules, statuses (by server-side apply) and Events.
//!
//! Writes are independent: a failed write is returned to the caller and does not prevent others.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource};
use raven_api::condition::{self, ConditionType, Verdict};
use raven_api::gateway::{Gateway, GatewaySpec, GatewayStatus};
use raven_api::guarded::Guarded;
use raven_api::names::{GROUP, MANAGER_CONTROLLER};
use raven_api::{GatewayNode, event};
use serde_json::{Value, json};

use crate::gateway::events::Change;
use crate::gateway::facts::{GatewayName, NodeName, UnreadableGateway};
use crate::gateway::status::{AGENT_NOT_READY, find_agents};
use crate::lead::Leadership;

/// Reason of condition Ready of a Gateway that cannot be parsed.
const UNREADABLE: &str = "Unreadable";

/// A write that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The API server rejected the write, or is unreachable.
    #[error("cannot {verb} Gateway {name}: {source}")]
    Api {
        /// The attempted operation.
        verb: &'static str,
        /// Name of the Gateway.
        name: String,
        /// Error of the client.
        source: Box<kube::Error>,
    },
    /// The Lease expired: a different replica may lead.
    #[error("cannot {verb} Gateway {name}: the Lease expired (was this process suspended?)")]
    NotLeading {
        /// The attempted operation.
        verb: &'static str,
        /// Name of the Gateway.
        name: String,
    },
    /// The GatewayNode of a removed node is left.
    #[error("cannot delete GatewayNode {name}, whose Node no longer exists: {source}")]
    Orphan {
        /// Name of the GatewayNode.
        name: NodeName,
        /// Error of the client.
        source: Box<kube::Error>,
    },
    /// The GatewayNode of a node without an agent still reports Ready.
    #[error("cannot set the conditions of GatewayNode {name}, whose agent does not work: {source}")]
    GatewayNode {
        /// Name of the GatewayNode.
        name: NodeName,
        /// Error of the client.
        source: Box<kube::Error>,
    },
    /// The status cannot be encoded.
    #[error("cannot encode the status of Gateway {name} as JSON: {source}")]
    Encode {
        /// Name of the Gateway.
        name: String,
        /// Error of the encoder.
        source: serde_json::Error,
    },
}

impl Error {
    /// Name of the Gateway whose stored spec makes the API server refuse its status, and the reason: it validates the whole
    /// object, and before Kubernetes 1.31 also what has not changed.
    pub(crate) fn invalid(&self) -> Option<(&str, &str)> {
        let Self::Api { name, source, .. } = self else { return None };
        let kube::Error::Api(status) = &**source else { return None };
        status.is_invalid().then_some((name.as_str(), status.message.as_str()))
    }
}

/// Writes Gateways and Events to the API server.
#[derive(Clone)]
pub(crate) struct Writer {
    client: Client,
    gateways: Api<Gateway>,
    reporter: Reporter,
    leadership: Leadership,
}

/// Result of writing a status.
#[derive(Debug)]
pub(crate) enum StatusWrite {
    /// The Gateway after the write.
    Written(Box<Gateway>),
    /// Not written: the Gateway was changed or deleted since the decision. The watch reports the change.
    Stale,
}

impl Writer {
    /// Creates a writer that writes only while this replica leads. `instance` is the reporter of Events.
    pub(crate) fn new(client: Client, instance: &str, leadership: Leadership) -> Self {
        let reporter = Reporter { controller: MANAGER_CONTROLLER.to_owned(), instance: Some(instance.to_owned()) };
        Self { gateways: Api::all(client.clone()), client, reporter, leadership }
    }

    /// Creates a Gateway of a pool rule. The controller never updates its spec: changes by users are preserved.
    pub(crate) async fn create(&self, gateway: &Gateway) -> Result<Gateway, Error> {
        self.require_leadership("create", gateway)?;
        let params = PostParams { field_manager: Some(MANAGER_CONTROLLER.to_owned()), ..Default::default() };
        self.gateways.create(&params, gateway).await.map_err(|e| error("create", gateway, e))
    }

    /// Deletes a Gateway, unless it was changed since the decision.
    pub(crate) async fn delete(&self, gateway: &Gateway) -> Result<(), Error> {
        self.require_leadership("delete", gateway)?;
        let (uid, resource_version) = (gateway.metadata.uid.clone(), gateway.metadata.resource_version.clone());
        let params =
            DeleteParams { preconditions: Some(Preconditions { uid, resource_version }), ..Default::default() };
        match self.gateways.delete(name_of(gateway), &params).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(e) => Err(error("delete", gateway, e)),
        }
    }

    /// Deletes the GatewayNode of a Node that does not exist. Returns false if the Node exists: the controller cannot read
    /// every Node, and its view may be older.
    pub(crate) async fn delete_orphan(&self, name: &NodeName) -> Result<bool, Error> {
        let failed = |e| Error::Orphan { name: name.clone(), source: Box::new(e) };
        let nodes: Api<Node> = Api::all(self.client.clone());
        if nodes.get_metadata_opt(name.as_str()).await.map_err(failed)?.is_some() || !self.leadership.is_valid() {
            return Ok(false);
        }
        let orphans: Api<GatewayNode> = Api::all(self.client.clone());
        match orphans.delete(name.as_str(), &DeleteParams::default()).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(true),
            Err(e) => Err(failed(e)),
        }
    }

    /// Replaces the conditions of a GatewayNode by Ready Unknown. The agent writes all of them again when it works.
    /// Returns false if this replica no longer leads.
    pub(crate) async fn silent(&self, name: &NodeName, now: Timestamp) -> Result<bool, Error> {
        if !self.leadership.is_valid() {
            return Ok(false);
        }
        let message = format!(
            "the agent of this node has not been Ready for some time, so its last report may be out of date: {}",
            find_agents(&[name.as_str()])
        );
        let condition = Condition {
            type_: ConditionType::Ready.as_str().to_owned(),
            status: "Unknown".to_owned(),
            reason: AGENT_NOT_READY.to_owned(),
            message,
            last_transition_time: Time(now),
            observed_generation: None,
        };
        let object = json!({
            "apiVersion": GatewayNode::api_version(&()), "kind": GatewayNode::kind(&()),
            "metadata": { "name": name.as_str() }, "status": { "conditions": [condition] },
        });
        let failed = |e| Error::GatewayNode { name: name.clone(), source: Box::new(e) };
        let nodes: Api<GatewayNode> = Api::all(self.client.clone());
        let params = PatchParams::apply(MANAGER_CONTROLLER).force();
        nodes.patch_status(name.as_str(), &params, &Patch::Apply(object)).await.map(|_| true).map_err(failed)
    }

    /// Writes a status, unless the Gateway was changed since the decision.
    pub(crate) async fn status(&self, gateway: &Gateway, status: &GatewayStatus) -> Result<StatusWrite, Error> {
        let patch = status_patch(gateway, status)
            .map_err(|source| Error::Encode { name: name_of(gateway).to_owned(), source })?;
        // Forced: takes over fields of upstream's field manager after a migration.
        let params = PatchParams::apply(MANAGER_CONTROLLER).force();
        self.require_leadership("apply status of", gateway)?;
        match self.gateways.patch_status(name_of(gateway), &params, &Patch::Apply(&patch)).await {
            Ok(written) => Ok(StatusWrite::Written(Box::new(written))),
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(StatusWrite::Stale),
            Err(e) => Err(error("apply status of", gateway, e)),
        }
    }

    /// Reports that a Gateway cannot be parsed: as its condition Ready, and as an Event. The API server may refuse the
    /// condition, because it validates the whole object.
    pub(crate) async fn unreadable(
        &self,
        name: &GatewayName,
        gateway: &UnreadableGateway,
        now: Timestamp,
    ) -> Result<(), Error> {
        const VERB: &str = "set the condition of";
        let mut reference = Gateway::new(name.as_str(), GatewaySpec::default());
        reference.metadata.uid.clone_from(&gateway.uid);
        self.require_leadership(VERB, &reference)?;
        let message = format!(
            "Raven cannot read this Gateway: {}. Correct it (kubectl edit gateway {name}); until then, its last version that \
             could be read stays in use, if there is one",
            gateway.error
        );
        let verdict = Verdict { type_: ConditionType::Ready, ok: false, reason: UNREADABLE, message: message.clone() };
        let patch = json!({"status": {"conditions": condition::merge(&[], &[verdict], None, now)}});
        let gateways: Api<Guarded<Gateway>> = Api::all(self.client.clone());
        let params = PatchParams { field_manager: Some(MANAGER_CONTROLLER.to_owned()), ..Default::default() };
        match gateways.patch_status(name.as_str(), &params, &Patch::Merge(patch)).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(()),
            Err(e) if !matches!(&e, kube::Error::Api(status) if status.is_invalid()) => {
                return Err(error(VERB, &reference, e));
            }
            _ => {}
        }
        let change = Change { warning: true, reason: UNREADABLE.to_owned(), note: message };
        self.event(&reference, &change, None).await;
        Ok(())
    }

    /// Publishes an Event about a Gateway, with `cause` as the related object. Returns false after a failure, which is
    /// logged: usually a condition has the same content.
    pub(crate) async fn event(&self, gateway: &Gateway, change: &Change, cause: Option<&Gateway>) -> bool {
        let event = Event {
            type_: if change.warning { EventType::Warning } else { EventType::Normal },
            reason: change.reason.clone(),
            note: Some(event::note(change.note.clone())),
            action: "Reconcile".to_owned(),
            secondary: cause.map(|gateway| gateway.object_ref(&())),
        };
        // A new recorder per Event: a recorder aggregates Events of the same reason and keeps the first note, so a
        // second replacement within minutes would be published with the nodes of the first one.
        let recorder = Recorder::new(self.client.clone(), self.reporter.clone());
        let published = recorder.publish(&event, &gateway.object_ref(&())).await;
        if let Err(e) = &published {
            tracing::warn!(gateway = name_of(gateway), reason = %change.reason, error = %e, "cannot publish an Event (check that RBAC allows it)");
        }
        published.is_ok()
    }

    fn require_leadership(&self, verb: &'static str, gateway: &Gateway) -> Result<(), Error> {
        if self.leadership.is_valid() {
            Ok(())
        } else {
            Err(Error::NotLeading { verb, name: name_of(gateway).to_owned() })
        }
    }
}

// Server-side apply removes fields that are no longer sent only if no other manager owns them, and upstream's manager
// may. Empty lists are therefore sent explicitly. UID and resource version make the API server reject the write if the
// Gateway changed since the decision.
fn status_patch(gateway: &Gateway, status: &GatewayStatus) -> Result<Value, serde_json::Error> {
    let mut status = serde_json::to_value(status)?;
    for list in ["nodes", "activeEndpoints", "conditions"] {
        if status.get(list).is_none() {
            status[list] = json!([]);
        }
    }
    Ok(json!({
        "apiVersion": format!("{GROUP}/v1beta1"),
        "kind": "Gateway",
        "metadata": { "name": gateway.metadata.name, "uid": gateway.metadata.uid, "resourceVersion": gateway.metadata.resource_version },
        "status": status,
    }))
}

fn name_of(gateway: &Gateway) -> &str {
    gateway.metadata.name.as_deref().unwrap_or_default()
}

fn error(verb: &'static str, gateway: &Gateway, source: kube::Error) -> Error {
    Error::Api { verb, name: name_of(gateway).to_owned(), source: Box::new(source) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_is_sent_without_leadership() {
        let nowhere = kube::Config::new(hyper::Uri::from_static("http://127.0.0.1:9"));
        let client = Client::try_from(nowhere).expect("a client that is never used");
        let (_elector, leadership) = crate::lead::Elector::new(client.clone(), "ns", "lease", "me");
        let writer = Writer::new(client, "me", leadership);
        let gateway = Gateway::new("g", raven_api::GatewaySpec::default());
        let refused =
            |result: Result<(), Error>| assert!(matches!(result, Err(Error::NotLeading { .. })), "{result:?}");
        refused(writer.create(&gateway).await.map(drop));
        refused(writer.delete(&gateway).await);
        refused(writer.status(&gateway, &GatewayStatus::default()).await.map(drop));
        assert!(matches!(writer.silent(&"n".into(), Timestamp::UNIX_EPOCH).await, Ok(false)));
    }

    #[test]
    fn status_write_requires_the_version_of_the_decision() {
        let mut gateway = Gateway::new("g", raven_api::GatewaySpec::default());
        (gateway.metadata.uid, gateway.metadata.resource_version) = (Some("u".to_owned()), Some("7".to_owned()));
        let patch = status_patch(&gateway, &GatewayStatus::default()).expect("a status is JSON");
        assert_eq!(patch["metadata"], json!({"name": "g", "uid": "u", "resourceVersion": "7"}));
    }

    #[test]
    fn empty_lists_are_sent_explicitly() {
        let gateway = Gateway::new("g", raven_api::GatewaySpec::default());
        let patch = status_patch(&gateway, &GatewayStatus::default()).expect("a status is JSON");
        assert_eq!(patch["status"]["activeEndpoints"], json!([]));
        assert_eq!(patch["status"]["nodes"], json!([]));
    }
}

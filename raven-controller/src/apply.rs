//! Writes decisions to the API server: Gateways by rule, statuses by server-side apply, Events.
//!
//! Each write stands alone: one that fails is reported to the caller and keeps no other from happening.

use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource};
use raven_api::gateway::{Gateway, GatewayStatus};
use raven_api::{GROUP, MANAGER_CONTROLLER};
use serde_json::{Value, json};

use crate::gateway::events::Change;
use crate::lead::Mandate;

// The API's limit for the note of an Event is 1 kB.
const NOTE_MAX: usize = 1000;

/// A write that did not happen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused it.
    #[error("{verb} Gateway {name}: {source}")]
    Api {
        /// What was tried.
        verb: &'static str,
        /// On which Gateway.
        name: String,
        /// What came back.
        source: Box<kube::Error>,
    },
    /// Somebody else may lead by now.
    #[error("{verb} Gateway {name}: not written, the Lease has run out (was this process stopped for a while?)")]
    NotLeading {
        /// What was to be done.
        verb: &'static str,
        /// To which Gateway.
        name: String,
    },
    /// A status that is no JSON.
    #[error("status of Gateway {name}: {source}")]
    Encode {
        /// Of which Gateway.
        name: String,
        /// Why.
        source: serde_json::Error,
    },
}

/// Writes to the API server.
#[derive(Clone)]
pub struct Writer {
    client: Client,
    gateways: Api<Gateway>,
    reporter: Reporter,
    mandate: Mandate,
}

/// What became of a status.
#[derive(Debug)]
pub enum Written {
    /// The Gateway is this now.
    Now(Box<Gateway>),
    /// It is not what the decision rests on any more: it has changed or gone, and the watch will tell.
    Overtaken,
}

// === impl Writer ===

impl Writer {
    /// A writer that signs Events as `instance`, and writes as long as the mandate holds.
    pub fn new(client: Client, instance: &str, mandate: Mandate) -> Self {
        let reporter = Reporter { controller: MANAGER_CONTROLLER.to_owned(), instance: Some(instance.to_owned()) };
        Self { gateways: Api::all(client.clone()), client, reporter, mandate }
    }

    /// Creates a Gateway that a pool rule wants. Never updates one: what a person adds to it is the person's.
    pub async fn create(&self, gateway: &Gateway) -> Result<Gateway, Error> {
        self.may("create", gateway)?;
        let params = PostParams { field_manager: Some(MANAGER_CONTROLLER.to_owned()), ..Default::default() };
        self.gateways.create(&params, gateway).await.map_err(|e| error("create", gateway, e))
    }

    /// Deletes a Gateway, if it still is what the decision rests on.
    pub async fn delete(&self, gateway: &Gateway) -> Result<(), Error> {
        self.may("delete", gateway)?;
        let (uid, resource_version) = (gateway.metadata.uid.clone(), gateway.metadata.resource_version.clone());
        let params = DeleteParams { preconditions: Some(Preconditions { uid, resource_version }), ..Default::default() };
        match self.gateways.delete(name_of(gateway), &params).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(e) => Err(error("delete", gateway, e)),
        }
    }

    /// Writes a status, if the Gateway still is what the decision rests on.
    pub async fn status(&self, gateway: &Gateway, status: &GatewayStatus) -> Result<Written, Error> {
        let patch = status_patch(gateway, status).map_err(|source| Error::Encode { name: name_of(gateway).to_owned(), source })?;
        // Forced: whoever else wrote status (upstream's manager, before the switch) does so no more.
        let params = PatchParams::apply(MANAGER_CONTROLLER).force();
        self.may("apply status of", gateway)?;
        match self.gateways.patch_status(name_of(gateway), &params, &Patch::Apply(&patch)).await {
            Ok(written) => Ok(Written::Now(Box::new(written))),
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(Written::Overtaken),
            Err(e) => Err(error("apply status of", gateway, e)),
        }
    }

    /// Publishes an Event about a Gateway, because of `cause` where that is another. One that is lost is lost: the condition says the same.
    pub async fn event(&self, gateway: &Gateway, change: &Change, cause: Option<&Gateway>) {
        let event = Event {
            type_: if change.warning { EventType::Warning } else { EventType::Normal },
            reason: change.reason.clone(),
            note: Some(truncated(&change.note, NOTE_MAX).to_owned()),
            action: "Reconcile".to_owned(),
            secondary: cause.map(|other| other.object_ref(&())),
        };
        // A recorder per Event: one that lives longer folds Events of the same reason into one and keeps the first note, so of two
        // replacements within minutes the second would be told with the first one's nodes.
        let recorder = Recorder::new(self.client.clone(), self.reporter.clone());
        if let Err(e) = recorder.publish(&event, &gateway.object_ref(&())).await {
            tracing::warn!(gateway = name_of(gateway), reason = %change.reason, error = %e, "publish an Event (does RBAC allow it?)");
        }
    }

    fn may(&self, verb: &'static str, gateway: &Gateway) -> Result<(), Error> {
        if self.mandate.holds() { Ok(()) } else { Err(Error::NotLeading { verb, name: name_of(gateway).to_owned() }) }
    }
}

// Server-side apply takes away what we no longer send, but only if nobody else owns it too; and upstream's manager may. So lists that are
// empty are sent as empty, which is a value and wins by force. uid and version make sure that it still is the Gateway that the decision rests on.
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

fn truncated(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_a_mandate_nothing_is_even_sent() {
        let nowhere = kube::Config::new(hyper::Uri::from_static("http://127.0.0.1:9"));
        let client = Client::try_from(nowhere).expect("a client that is never used");
        let (_elector, mandate) = crate::lead::Elector::new(client.clone(), "ns", "lease", "me");
        let writer = Writer::new(client, "me", mandate);
        let gateway = Gateway::new("g", raven_api::GatewaySpec::default());
        let refused = |result: Result<(), Error>| assert!(matches!(result, Err(Error::NotLeading { .. })), "{result:?}");
        refused(writer.create(&gateway).await.map(drop));
        refused(writer.delete(&gateway).await);
        refused(writer.status(&gateway, &GatewayStatus::default()).await.map(drop));
    }

    #[test]
    fn a_status_is_written_onto_the_version_that_it_was_decided_on() {
        let mut gateway = Gateway::new("g", raven_api::GatewaySpec::default());
        (gateway.metadata.uid, gateway.metadata.resource_version) = (Some("u".to_owned()), Some("7".to_owned()));
        let patch = status_patch(&gateway, &GatewayStatus::default()).expect("a status is JSON");
        assert_eq!(patch["metadata"], json!({"name": "g", "uid": "u", "resourceVersion": "7"}));
    }

    #[test]
    fn empty_lists_are_sent_so_that_they_replace_what_another_manager_left() {
        let gateway = Gateway::new("g", raven_api::GatewaySpec::default());
        let patch = status_patch(&gateway, &GatewayStatus::default()).expect("a status is JSON");
        assert_eq!(patch["status"]["activeEndpoints"], json!([]));
        assert_eq!(patch["status"]["nodes"], json!([]));
    }

    #[test]
    fn a_note_is_cut_between_characters() {
        assert_eq!(truncated("aé", 2), "a");
        assert_eq!(truncated("aé", 3), "aé");
    }
}

//! Writes what [`services`](super::services) and [`dns`](super::dns) say, and takes away what they do not say any more.

use std::{collections::BTreeMap, fmt::Debug, time::Duration};

use k8s_openapi::api::{
    core::v1::{ConfigMap, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use raven_api::{
    MANAGER_CONTROLLER,
    proxy::{DNS_CONFIG_MAP, DNS_KEY},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::interval;

use super::{
    dns,
    follow::{Changes, Cluster},
    services::{self, LABEL_MANAGED_BY},
};
use crate::lead::Mandate;

/// Everything is written again now and then: somebody else may have changed it.
const REFRESH: Duration = Duration::from_secs(300);
/// After a failure.
const AGAIN: Duration = Duration::from_secs(3);

/// Why something could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source} (does RBAC allow it? see deploy/rbac.yaml)")]
struct Error {
    what: String,
    source: Box<kube::Error>,
}

fn error(what: impl Into<String>) -> impl FnOnce(kube::Error) -> Error {
    let what = what.into();
    move |source| Error { what, source: Box::new(source) }
}

/// Publishes.
pub struct Publisher {
    client: Client,
    namespace: String,
    cluster: Cluster,
    changes: Changes,
    mandate: Mandate,
    /// What was written, by kind and name.
    written: BTreeMap<(&'static str, String), Value>,
}

impl Publisher {
    /// A publisher that has written nothing yet.
    pub fn new(client: Client, namespace: String, cluster: Cluster, changes: Changes, mandate: Mandate) -> Self {
        Self { client, namespace, cluster, changes, mandate, written: BTreeMap::new() }
    }

    /// Runs for ever.
    pub async fn run(mut self) {
        let (mut refresh, mut again) = (interval(REFRESH), interval(AGAIN));
        let mut failed = true;
        loop {
            tokio::select! {
                () = self.changes.next() => {}
                changed = self.mandate.leads.changed() => {
                    if changed.is_err() { return }
                    self.written.clear();
                }
                _ = refresh.tick() => self.written.clear(),
                _ = again.tick(), if failed => {}
            }
            failed = !self.mandate.holds() || !self.cluster.complete();
            if !failed && let Err(e) = self.publish().await {
                tracing::warn!("{e}");
                failed = true;
            }
        }
    }

    async fn publish(&mut self) -> Result<(), Error> {
        let l7 = self.cluster.l7();
        let gateways = self.cluster.gateways();
        let objects = services::desired(&self.namespace, &gateways, &self.cluster.gateway_nodes(), l7);
        self.apply::<Service>("Service", &objects.services).await?;
        self.apply::<EndpointSlice>("EndpointSlice", &objects.slices).await?;
        let service = if l7 { self.cluster.service() } else { Vec::new() };
        let hosts = dns::hosts(&self.cluster.nodes(), &gateways, &service);
        let map = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": DNS_CONFIG_MAP }, "data": { DNS_KEY: hosts } });
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        self.put(&api, "ConfigMap", DNS_CONFIG_MAP, &map).await
    }

    /// Writes all of a kind, and deletes what carries our label besides.
    async fn apply<K>(&mut self, kind: &'static str, objects: &BTreeMap<String, Value>) -> Result<(), Error>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), &self.namespace);
        for (name, object) in objects {
            self.put(&api, kind, name, object).await?;
        }
        let ours = ListParams::default().labels(&format!("{LABEL_MANAGED_BY}={MANAGER_CONTROLLER}"));
        for present in api.list(&ours).await.map_err(error(format!("list {kind}s")))? {
            let name = present.name_any();
            if objects.contains_key(&name) {
                continue;
            }
            match api.delete(&name, &DeleteParams::default()).await {
                Ok(_) => tracing::info!(kind, name, "deleted: nobody needs it any more"),
                Err(kube::Error::Api(status)) if status.is_not_found() => {}
                Err(e) => return Err(error(format!("delete {kind} {name}"))(e)),
            }
            self.written.remove(&(kind, name));
        }
        Ok(())
    }

    async fn put<K>(&mut self, api: &Api<K>, kind: &'static str, name: &str, object: &Value) -> Result<(), Error>
    where
        K: Clone + DeserializeOwned + Debug,
    {
        let key = (kind, name.to_owned());
        if self.written.get(&key) == Some(object) {
            return Ok(());
        }
        let params = PatchParams::apply(MANAGER_CONTROLLER).force();
        api.patch(name, &params, &Patch::Apply(object)).await.map_err(error(format!("apply {kind} {name}")))?;
        tracing::info!(kind, name, "written");
        self.written.insert(key, object.clone());
        Ok(())
    }
}

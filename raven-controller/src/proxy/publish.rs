//! Writes the objects of [`services`] and [`dns`], and deletes those that are no longer desired.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::{
    core::v1::{ConfigMap, Endpoints, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use raven_api::{
    names::{LABEL_MANAGED_BY, MANAGER_CONTROLLER},
    proxy::{DNS_CONFIG_MAP, DNS_KEY, INTERNAL_SERVICE},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, interval, timeout_at},
};
use tracing::Instrument;

use super::{dns, services};
use crate::cluster::Snapshot;
use crate::lead::Leadership;

/// Interval after which all objects are written again: another program may have changed them.
const REFRESH: Duration = Duration::from_secs(300);
/// Interval after which missing objects are written again: another program may have deleted them.
const CHECK: Duration = Duration::from_secs(30);
/// Changes that follow each other within this time are published together.
const SETTLE: Duration = Duration::from_millis(200);
/// Maximum time during which changes are collected.
const BURST: Duration = Duration::from_secs(1);
/// Delay after a failure.
const RETRY: Duration = Duration::from_secs(3);

/// An object could not be written or deleted.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source} (check that RBAC allows it, see deploy/rbac.yaml)")]
struct Error {
    what: String,
    source: Box<kube::Error>,
}

fn error(what: impl Into<String>) -> impl FnOnce(kube::Error) -> Error {
    let what = what.into();
    move |source| Error { what, source: Box::new(source) }
}

/// Writes Services, EndpointSlices and the hosts file.
pub(crate) struct Publisher {
    client: Client,
    namespace: String,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    leadership: Leadership,
    /// Objects as last written, by kind and name.
    written: BTreeMap<(&'static str, String), Value>,
}

impl Publisher {
    /// Creates a publisher.
    pub(crate) fn new(
        client: Client,
        namespace: String,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        leadership: Leadership,
    ) -> Self {
        Self { client, namespace, snapshots, leadership, written: BTreeMap::new() }
    }

    /// Publishes after each change of the cluster while this replica leads. Runs until the elector ends.
    pub(crate) async fn run(mut self) {
        let (mut refresh, mut check, mut retry) = (interval(REFRESH), interval(CHECK), interval(RETRY));
        let mut failed = true;
        loop {
            tokio::select! {
                changed = self.snapshots.changed() => {
                    if changed.is_err() { return }
                    self.settle().await;
                }
                changed = self.leadership.leads.changed() => {
                    if changed.is_err() { return }
                    self.written.clear();
                }
                _ = refresh.tick() => self.written.clear(),
                _ = check.tick() => {}
                _ = retry.tick(), if failed => {}
            }
            let snapshot = self.snapshots.borrow_and_update().clone();
            failed = !self.leadership.is_valid() || !snapshot.proxies_complete;
            if failed {
                continue;
            }
            let span = tracing::info_span!("publish", revision = snapshot.revision);
            if let Err(e) = self.publish(&snapshot).instrument(span.clone()).await {
                span.in_scope(|| tracing::warn!(error = %e, "cannot publish all objects of the L7 half; retrying"));
                failed = true;
            }
        }
    }

    /// Waits until the cluster has not changed for [`SETTLE`], at most for [`BURST`].
    async fn settle(&mut self) {
        let end = Instant::now() + BURST;
        while let Ok(Ok(())) = timeout_at(end.min(Instant::now() + SETTLE), self.snapshots.changed()).await {}
    }

    /// Writes all objects. They are independent: a rejected one (a quota, an admission policy) does not prevent the
    /// others. Returns the first error.
    async fn publish(&mut self, snapshot: &Snapshot) -> Result<(), Error> {
        let l7 = snapshot.l7();
        let gateways = snapshot.gateways();
        let objects = services::desired(&self.namespace, &gateways, &snapshot.ready_proxies(), l7);
        let services = self.apply::<Service>("Service", &objects.services).await;
        let slices = self.apply::<EndpointSlice>("EndpointSlice", &objects.slices).await;
        let service = if l7 { snapshot.internal_service() } else { &[] };
        let hosts = dns::hosts(snapshot.nodes(), &gateways, service);
        let map = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": DNS_CONFIG_MAP }, "data": { DNS_KEY: hosts } });
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let hosts = self.put(&api, "ConfigMap", DNS_CONFIG_MAP, &map).await;
        services.and(slices).and(hosts).and(self.delete_upstream_endpoints().await)
    }

    /// Deletes the Endpoints that upstream's Raven leaves behind under the name of the internal Service. They have no
    /// owner, and Kubernetes mirrors them into an EndpointSlice with the nodes elected at that time. Done once, and
    /// again with each refresh.
    async fn delete_upstream_endpoints(&mut self) -> Result<(), Error> {
        let (kind, name) = ("Endpoints", INTERNAL_SERVICE.to_owned());
        if !self.written.contains_key(&(kind, name.clone())) {
            let api: Api<Endpoints> = Api::namespaced(self.client.clone(), &self.namespace);
            self.delete(&api, kind, &name).await?;
            self.written.insert((kind, name), Value::Null);
        }
        Ok(())
    }

    /// Writes all desired objects of a kind, and deletes other objects with the controller's label.
    async fn apply<K>(&mut self, kind: &'static str, objects: &BTreeMap<String, Value>) -> Result<(), Error>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), &self.namespace);
        let ours = ListParams::default().labels(&format!("{LABEL_MANAGED_BY}={MANAGER_CONTROLLER}"));
        let listed = api.list(&ours).await.map_err(error(format!("list {kind}s")));
        let present: BTreeSet<String> = listed.iter().flatten().map(ResourceExt::name_any).collect();
        if listed.is_ok() {
            // Objects that another program deleted are written again.
            self.written.retain(|(of, name), _| *of != kind || present.contains(name));
        }
        let mut outcome = listed.map(drop);
        for (name, object) in objects {
            outcome = outcome.and(self.put(&api, kind, name, object).await);
        }
        for name in present.iter().filter(|name| !objects.contains_key(*name)) {
            outcome = outcome.and(self.delete(&api, kind, name).await);
        }
        outcome
    }

    async fn delete<K>(&mut self, api: &Api<K>, kind: &'static str, name: &str) -> Result<(), Error>
    where
        K: Clone + DeserializeOwned + Debug,
    {
        match api.delete(name, &DeleteParams::default()).await {
            Ok(_) => tracing::info!(kind, name, "deleted an object that is no longer desired"),
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            Err(e) => return Err(error(format!("delete {kind} {name}"))(e)),
        }
        self.written.remove(&(kind, name.to_owned()));
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
        tracing::info!(kind, name, "wrote an object");
        self.written.insert(key, object.clone());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use kube::runtime::watcher::Event;

    use super::*;
    use crate::{
        cluster::{Cluster, DecisionSettings, ObservedGatewayNode, Update},
        fake_api::{FakeApi, list},
        lead::Elector,
    };

    const SERVICES: &str = "/api/v1/namespaces/kube-system/services";
    const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices";
    const HOSTS: &str = "PATCH /api/v1/namespaces/kube-system/configmaps/edge-tunnel-nodes";

    /// A cluster with one cloud node behind a load balancer.
    fn cluster() -> Snapshot {
        let mut cluster = Cluster::new(DecisionSettings::default());
        let gateway = json!({
            "metadata": {"name": "cloud"}, "spec": {"exposeType": "LoadBalancer"},
            "status": {"nodes": [{"nodeName": "a", "privateIP": "10.0.0.1"}], "activeEndpoints": [{"nodeName": "a", "type": "proxy"}]},
        });
        cluster.absorb(Update::Gateway(Event::Apply(serde_json::from_value(gateway).expect("a Gateway"))));
        let node = r#"{"metadata":{"name":"a"},"spec":{},"status":{"proxy":{"ready":true}}}"#;
        let (observed, _) = ObservedGatewayNode::parse(serde_json::from_str(node).expect("a GatewayNode"));
        cluster.absorb(Update::GatewayNode(Event::Apply(observed)));
        cluster.snapshot()
    }

    /// Publishes to a fake API server. `special` returns responses other than success.
    async fn publisher(
        special: impl Fn(&str) -> Option<Result<String, u16>> + Send + Sync + 'static,
    ) -> (FakeApi, Publisher) {
        let api = FakeApi::serve(move |request| {
            let success = || if request.starts_with("GET") { list(&[]) } else { "{}".to_owned() };
            special(request).unwrap_or_else(|| Ok(success()))
        })
        .await;
        let (_, leadership) = Elector::new(api.client.clone(), "kube-system", "lease", "me");
        let (_, snapshots) = watch::channel(Arc::new(cluster()));
        let publisher = Publisher::new(api.client.clone(), "kube-system".to_owned(), snapshots, leadership);
        (api, publisher)
    }

    #[tokio::test]
    async fn rejected_object_does_not_prevent_others() {
        let load_balancer = services::load_balancer_name("x-raven-proxy-svc", "cloud", "a");
        for refused in [
            format!("PATCH {SERVICES}/{load_balancer}"),
            format!("PATCH {SERVICES}/x-raven-proxy-internal-svc"),
            format!("GET {SLICES}"),
        ] {
            let no = refused.clone();
            let (api, mut publisher) = publisher(move |request| (request == no).then_some(Err(403))).await;
            let error = publisher.publish(&cluster()).await.expect_err("the first error is returned").to_string();
            let what = refused.rsplit('/').next().expect("a last part");
            assert!(error.to_lowercase().contains(what), "{error}");
            let requests = api.take_requests();
            let written = |what: &str| requests.iter().any(|request| request == what);
            assert!(
                written(&format!("PATCH {SERVICES}/{load_balancer}"))
                    && written(&format!("PATCH {SLICES}/{load_balancer}")),
                "{requests:?}"
            );
            assert!(written(&format!("PATCH {SERVICES}/x-raven-proxy-internal-svc")), "{requests:?}");
            assert!(written(&format!("PATCH {SLICES}/x-raven-proxy-internal-svc-a")) && written(HOSTS), "{requests:?}");
        }
    }

    #[tokio::test]
    async fn deleted_objects_are_restored_and_present_ones_are_not_written() {
        let stored = Arc::new(std::sync::Mutex::new(Vec::new()));
        let present = stored.clone();
        let (api, mut publisher) = publisher(move |request| {
            let present = present.lock().expect("no test holds it");
            let items: Vec<String> =
                present.iter().map(|name| format!(r#"{{"metadata":{{"name":"{name}"}}}}"#)).collect();
            (request == format!("GET {SERVICES}"))
                .then(|| Ok(list(&items.iter().map(String::as_str).collect::<Vec<_>>())))
        })
        .await;
        publisher.publish(&cluster()).await.expect("written");
        let load_balancer = services::load_balancer_name("x-raven-proxy-svc", "cloud", "a");
        let written = |api: &FakeApi| {
            api.take_requests()
                .into_iter()
                .filter(|request| request.starts_with(&format!("PATCH {SERVICES}")))
                .collect::<Vec<_>>()
        };
        assert_eq!(written(&api).len(), 2);
        stored
            .lock()
            .expect("no test holds it")
            .extend(["x-raven-proxy-internal-svc".to_owned(), load_balancer.clone()]);
        publisher.publish(&cluster()).await.expect("nothing to do");
        assert_eq!(written(&api), Vec::<String>::new());
        stored.lock().expect("no test holds it").pop();
        publisher.publish(&cluster()).await.expect("written");
        assert_eq!(written(&api), [format!("PATCH {SERVICES}/{load_balancer}")]);
    }

    #[tokio::test]
    async fn endpoints_of_upstream_are_deleted_once() {
        const ENDPOINTS: &str = "DELETE /api/v1/namespaces/kube-system/endpoints/x-raven-proxy-internal-svc";
        let (api, mut publisher) = publisher(|_| None).await;
        let deletions = |api: &FakeApi| api.take_requests().iter().filter(|request| *request == ENDPOINTS).count();
        publisher.publish(&cluster()).await.expect("written");
        publisher.publish(&cluster()).await.expect("written");
        assert_eq!(deletions(&api), 1);
        let (_api, mut publisher) = self::publisher(|request| (request == ENDPOINTS).then_some(Err(404))).await;
        publisher.publish(&cluster()).await.expect("there are none");
    }
}

//! Tests of generated Gateways: the three rules for nodes that no user-written Gateway selects.

use anyhow::{Result, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use raven_api::gateway::ExposeType;
use raven_api::pool::NodePool;
use raven_api::{LABEL_EDGE_WORKER, LABEL_NODE_POOL};
use raven_tests::{eventually, test_name};
use serde_json::json;

use crate::fixture::{Fixture, SOON, has_condition, nodes, run, tunnel};

const CRD: &str = "nodepools.apps.openyurt.io";

#[tokio::test(flavor = "multi_thread")]
async fn pools_are_derived_from_node_pools_or_node_labels() {
    run(test_name!(), async |fixture| {
        for (name, number, edge) in [("c-a", 1, "false"), ("c-b", 2, "false"), ("e-a", 3, "true"), ("e-b", 4, "true")] {
            fixture.put_node(name, number, &[(LABEL_EDGE_WORKER, edge)]).await?;
        }
        let controller = fixture.controller("one", &[]).await?;

        // Rules 2 and 3: there is no NodePool.
        fixture.until_gateways(&["cloud", "node-e-a", "node-e-b"]).await?;
        let cloud = has(fixture, "cloud", &["c-a", "c-b"]).await?;
        assert_eq!(cloud.spec.expose_type, ExposeType::PublicIP);
        let ready = |g: &raven_api::Gateway| {
            has_condition(g, "Ready", "True", "Ready", "no publicIP is set for c-a: other pools dial its InternalIP")
        };
        fixture.until("cloud", "reports the missing publicIP", ready).await?;
        let edge = has(fixture, "node-e-b", &["e-b"]).await?;
        assert_eq!((edge.spec.expose_type, tunnel(&edge)), (ExposeType::Edge, vec!["e-b"]));
        let label = edge.metadata.labels.as_ref().and_then(|l| l.get("app.kubernetes.io/managed-by"));
        assert_eq!(label.map(String::as_str), Some("raven-controller"));
        fixture.until("node-e-b", "is ready", |g| has_condition(g, "Ready", "True", "Ready", "")).await?;

        // A Gateway written by a user takes precedence.
        fixture
            .put_gateway("mine", json!({"nodeSelector": {"matchLabels": {"kubernetes.io/hostname": "e-b"}}}))
            .await?;
        fixture.until_gateways(&["cloud", "mine", "node-e-a"]).await?;
        has(fixture, "mine", &["e-b"]).await?;

        // Rule 1: OpenYurt is installed, and a NodePool at the edge is created.
        let before = fixture.raw("cloud").await?;
        put_node_pool(fixture, "east", "Edge").await?;
        fixture.label("e-a", LABEL_NODE_POOL, Some("east")).await?;
        fixture.until_gateways(&["cloud", "mine", "pool-east"]).await?;
        let pool = has(fixture, "pool-east", &["e-a"]).await?;
        assert_eq!(pool.spec.expose_type, ExposeType::Edge);

        // A node that no Gateway selects, on a side with NodePools, is in no pool.
        fixture.gateways.delete("mine", &DeleteParams::default()).await?;
        fixture.until_gateways(&["cloud", "pool-east"]).await?;
        eventually(SOON, "the controller logs the node without a pool", async || {
            let log = controller.output()?;
            ensure!(log.contains("edge node e-b belongs to no pool"), "{log}");
            Ok(())
        })
        .await?;
        fixture.label("e-b", LABEL_NODE_POOL, Some("east")).await?;
        has(fixture, "pool-east", &["e-a", "e-b"]).await?;
        assert_eq!(fixture.raw("cloud").await?, before, "the other Gateway must not change");

        // OpenYurt is uninstalled.
        let crds: Api<CustomResourceDefinition> = Api::all(fixture.lab.cluster().client());
        crds.delete(CRD, &DeleteParams::default()).await?;
        fixture.until_gateways(&["cloud", "node-e-a", "node-e-b"]).await?;
        has(fixture, "node-e-a", &["e-a"]).await?;
        Ok(())
    })
    .await;
}

async fn has(fixture: &Fixture, gateway: &str, expected: &[&str]) -> Result<raven_api::Gateway> {
    let check = |gateway: &raven_api::Gateway| {
        ensure!(nodes(gateway) == expected, "the nodes are {:?}", nodes(gateway));
        Ok(())
    };
    fixture.until(gateway, &format!("has nodes {expected:?}"), check).await
}

async fn put_node_pool(fixture: &Fixture, name: &str, type_: &str) -> Result<()> {
    let client = fixture.lab.cluster().client();
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let schema = json!({"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}});
    let crd = serde_json::from_value(json!({
        "metadata": {"name": CRD},
        "spec": {
            "group": "apps.openyurt.io",
            "scope": "Cluster",
            "names": {"kind": "NodePool", "plural": "nodepools"},
            "versions": [{"name": "v1beta1", "served": true, "storage": true, "schema": schema}],
        },
    }))?;
    crds.create(&PostParams::default(), &crd).await?;
    let pools: Api<NodePool> = Api::all(client);
    let pool: NodePool = serde_json::from_value(json!({
        "apiVersion": "apps.openyurt.io/v1beta1", "kind": "NodePool", "metadata": {"name": name}, "spec": {"type": type_},
    }))?;
    eventually(SOON, "the API server accepts NodePools", async || {
        Ok(pools.create(&PostParams::default(), &pool).await.map(drop)?)
    })
    .await
}

//! The three rules: what happens to nodes for which nobody wrote a Gateway.

use anyhow::{Result, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use raven_api::gateway::ExposeType;
use raven_api::pool::NodePool;
use raven_api::{LABEL_EDGE_WORKER, LABEL_NODE_POOL};
use raven_tests::eventually;
use serde_json::json;

use crate::stage::{SOON, Stage, nodes, play, says, tunnel};

const CRD: &str = "nodepools.apps.openyurt.io";

#[tokio::test(flavor = "multi_thread")]
async fn pools_come_from_node_pools_else_the_cloud_is_one_and_every_edge_node_its_own() {
    play("pools_come_from_node_pools_else_the_cloud_is_one_and_every_edge_node_its_own", async |stage| {
        for (name, number, edge) in [("c-a", 1, "false"), ("c-b", 2, "false"), ("e-a", 3, "true"), ("e-b", 4, "true")] {
            stage.put_node(name, number, &[(LABEL_EDGE_WORKER, edge)]).await?;
        }
        let controller = stage.controller("one", &[]).await?;

        // Rules 2 and 3: no NodePool anywhere.
        stage.until_gateways(&["cloud", "node-e-a", "node-e-b"]).await?;
        let cloud = has(stage, "cloud", &["c-a", "c-b"]).await?;
        assert_eq!(cloud.spec.expose_type, ExposeType::PublicIP);
        let told =
            |g: &raven_api::Gateway| says(g, "Ready", "True", "Ready", "no publicIP is set for c-a: other pools dial its InternalIP");
        stage.until("cloud", "says what is missing", told).await?;
        let edge = has(stage, "node-e-b", &["e-b"]).await?;
        assert_eq!((edge.spec.expose_type, tunnel(&edge)), (ExposeType::Edge, vec!["e-b"]));
        let label = edge.metadata.labels.as_ref().and_then(|l| l.get("app.kubernetes.io/managed-by"));
        assert_eq!(label.map(String::as_str), Some("raven-controller"));
        stage.until("node-e-b", "is ready", |g| says(g, "Ready", "True", "Ready", "")).await?;

        // One that a person wrote wins.
        stage.put_gateway("mine", json!({"nodeSelector": {"matchLabels": {"kubernetes.io/hostname": "e-b"}}})).await?;
        stage.until_gateways(&["cloud", "mine", "node-e-a"]).await?;
        has(stage, "mine", &["e-b"]).await?;

        // Rule 1: OpenYurt is installed, and somebody makes a NodePool at the edge.
        let before = stage.raw("cloud").await?;
        put_node_pool(stage, "east", "Edge").await?;
        stage.label("e-a", LABEL_NODE_POOL, Some("east")).await?;
        stage.until_gateways(&["cloud", "mine", "pool-east"]).await?;
        let pool = has(stage, "pool-east", &["e-a"]).await?;
        assert_eq!(pool.spec.expose_type, ExposeType::Edge);

        // A node that nobody claims any more, on a side that has NodePools, is in none of them.
        stage.gateways.delete("mine", &DeleteParams::default()).await?;
        stage.until_gateways(&["cloud", "pool-east"]).await?;
        eventually(SOON, "the controller says which node has no pool", async || {
            let log = controller.output()?;
            ensure!(log.contains("edge node e-b belongs to no pool"), "{log}");
            Ok(())
        })
        .await?;
        stage.label("e-b", LABEL_NODE_POOL, Some("east")).await?;
        has(stage, "pool-east", &["e-a", "e-b"]).await?;
        assert_eq!(stage.raw("cloud").await?, before, "nothing of this is the cloud's business");

        // OpenYurt is taken away again.
        let crds: Api<CustomResourceDefinition> = Api::all(stage.lab.cluster().client());
        crds.delete(CRD, &DeleteParams::default()).await?;
        stage.until_gateways(&["cloud", "node-e-a", "node-e-b"]).await?;
        has(stage, "node-e-a", &["e-a"]).await?;
        Ok(())
    })
    .await;
}

async fn has(stage: &Stage, gateway: &str, expected: &[&str]) -> Result<raven_api::Gateway> {
    let check = |gateway: &raven_api::Gateway| {
        ensure!(nodes(gateway) == expected, "its nodes: {:?}", nodes(gateway));
        Ok(())
    };
    stage.until(gateway, &format!("has nodes {expected:?}"), check).await
}

async fn put_node_pool(stage: &Stage, name: &str, type_: &str) -> Result<()> {
    let client = stage.lab.cluster().client();
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
    eventually(SOON, "the API server takes NodePools", async || Ok(pools.create(&PostParams::default(), &pool).await.map(drop)?)).await
}

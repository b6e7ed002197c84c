//! `/openapi.json`: what may be asked, for programs and for tools that make clients (OpenAPI 3.1).

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::{Service, answer};

pub(super) async fn page(State(s): State<Arc<Service>>) -> Response {
    let names: Vec<&str> = s.models.all().iter().map(|m| m.name.as_str()).collect();
    let text = described(&names, s.options.batch, s.options.access.token.is_some()).to_string();
    answer(StatusCode::OK, "application/json", text.into_bytes().into())
}

/// The description of a server of these models. `most`: samples of a request; `token`: whether it wants one.
fn described(models: &[&str], most: usize, token: bool) -> Value {
    let whole = |default: u64| json!({ "type": "integer", "minimum": 0, "default": default });
    let query = |name: &str, text: &str, schema: Value| json!({ "name": name, "in": "query", "description": text, "schema": schema });
    let number = |default: u64| json!({ "type": "integer", "minimum": 1, "maximum": most, "default": default });
    let mut asked = vec![
        query("seed", "seed of the noise and of classes that are not given", whole(0)),
        query("index", "number of the first sample of the seed", whole(0)),
        query("n", "samples", number(1)),
        query("classes", "classes of the samples in turn, by commas", json!({ "type": "string" })),
        query("format", "png, or npy for the array", json!({ "type": "string", "enum": ["png", "npy"] })),
    ];
    let mut model =
        query("model", "which model, where several are served", json!({ "type": "string", "enum": models }));
    model["required"] = json!(models.len() > 1);
    asked.push(model);
    let bytes = || json!({ "schema": { "type": "string", "format": "binary" } });
    let error = json!({ "$ref": "#/components/responses/Error" });
    let sample = |body: Option<Value>, operation: &str, summary: &str| {
        let mut value = json!({
            "operationId": operation,
            "summary": summary,
            "parameters": asked,
            "responses": {
                "200": { "description": "the samples", "content": { "image/png": bytes(), "application/x-npy": bytes() } },
                "default": error,
            },
        });
        if let Some(body) = body {
            value["requestBody"] = body;
        }
        value
    };
    let rows = json!({
        "description": "noise, and rows for conditions that are no classes, by the names of the inputs: an .npz archive, a .npy array of \
                        noise, or JSON",
        "content": {
            "application/json": { "schema": { "type": "object" } },
            "application/octet-stream": bytes(),
        },
    });
    let json_page = |operation: &str, summary: &str, parameters: &[Value]| {
        json!({ "get": {
            "operationId": operation,
            "summary": summary,
            "parameters": parameters,
            "responses": {
                "200": { "description": "as asked", "content": { "application/json": { "schema": {} } } },
                "default": error,
            },
        } })
    };
    let status = |operation: &str, summary: &str, parameters: &[Value]| {
        json!({ "get": {
            "operationId": operation,
            "summary": summary,
            "parameters": parameters,
            "responses": { "200": { "description": "yes" }, "503": { "description": "no" }, "default": error },
        } })
    };
    let name =
        json!({ "name": "name", "in": "path", "required": true, "schema": { "type": "string", "enum": models } });
    let infer = json!({ "post": {
        "operationId": "infer",
        "summary": "Samples by tensors, as JSON or by the binary tensor extension",
        "parameters": [name],
        "requestBody": { "required": true, "content": {
            "application/json": { "schema": { "$ref": "#/components/schemas/InferRequest" } },
            "application/octet-stream": bytes(),
        } },
        "responses": {
            "200": { "description": "the output `sample`", "content": {
                "application/json": { "schema": { "$ref": "#/components/schemas/InferResponse" } },
                "application/octet-stream": bytes(),
            } },
            "default": error,
        },
    } });
    let metrics = json!({ "get": {
        "operationId": "metrics",
        "summary": "Counts, durations and the process, as OpenMetrics text",
        "responses": { "200": { "description": "the page", "content": { (super::metrics::CONTENT_TYPE): { "schema": { "type": "string" } } } } },
    } });
    let index = json!({ "post": {
        "operationId": "repositoryIndex",
        "summary": "The models that are served",
        "responses": { "200": { "description": "their names", "content": { "application/json": { "schema": { "type": "array" } } } }, "default": error },
    } });
    let sampled = json!({
        "get": sample(None, "sample", "Samples of a student from a seed"),
        "post": sample(Some(rows), "sampleOf", "Samples of a student from noise or rows that the caller brings"),
    });
    let mut paths = Map::new();
    let all = [
        ("/sample", sampled),
        ("/health", json_page("health", "Whether the server takes requests, and what it serves", &[])),
        ("/metrics", metrics),
        ("/v2", json_page("server", "Name, version and extensions", &[])),
        ("/v2/health/live", status("live", "Whether the process lives", &[])),
        ("/v2/health/ready", status("ready", "Whether requests are taken", &[])),
        ("/v2/repository/index", index),
        ("/v2/models/{name}", json_page("model", "Inputs and outputs", std::slice::from_ref(&name))),
        (
            "/v2/models/{name}/ready",
            status("modelReady", "Whether the model takes requests", std::slice::from_ref(&name)),
        ),
        ("/v2/models/{name}/infer", infer),
    ];
    paths.extend(all.map(|(path, value)| (path.to_owned(), value)));
    let tensor = |data: Value| {
        json!({ "type": "object", "required": ["name", "shape", "datatype"], "properties": {
            "name": { "type": "string" }, "datatype": { "type": "string" },
            "shape": { "type": "array", "items": { "type": "integer" } },
            "parameters": { "type": "object" }, "data": data } })
    };
    let mut value = json!({
        "openapi": "3.1.0",
        "info": { "title": "disback", "version": env!("CARGO_PKG_VERSION"), "description": "One-step students behind HTTP." },
        "paths": paths,
        "components": {
            "responses": { "Error": { "description": "what was wrong", "content": { "application/json": { "schema": {
                "type": "object", "required": ["error"], "properties": { "error": { "type": "string" } } } } } } },
            "schemas": {
                "InferRequest": { "type": "object", "properties": {
                    "id": { "type": "string" },
                    "parameters": { "type": "object", "properties": { "seed": whole(0), "index": whole(0), "n": number(1) } },
                    "inputs": { "type": "array", "items": tensor(json!({ "type": "array" })) },
                    "outputs": { "type": "array", "items": { "type": "object", "required": ["name"] } } } },
                "InferResponse": { "type": "object", "required": ["model_name", "outputs"], "properties": {
                    "model_name": { "type": "string" }, "model_version": { "type": "string" }, "id": { "type": "string" },
                    "outputs": { "type": "array", "items": tensor(json!({ "type": "array" })) } } },
            },
        },
    });
    if token {
        value["components"]["securitySchemes"] = json!({ "token": { "type": "http", "scheme": "bearer" } });
        value["security"] = json!([{ "token": [] }]);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_is_there_and_every_operation_has_its_own_name() {
        let value = described(&["a", "b"], 64, true);
        let text = value.to_string();
        for part in text.split("\"$ref\":\"#").skip(1) {
            let pointer = part.split('"').next().unwrap();
            assert!(value.pointer(pointer).is_some(), "{pointer}");
        }
        let mut names = Vec::new();
        for (path, methods) in value["paths"].as_object().unwrap() {
            for operation in methods.as_object().unwrap().values() {
                names.push(operation["operationId"].as_str().unwrap());
                // What the path holds in braces is declared.
                let declared = operation["parameters"].to_string();
                assert!(!path.contains("{name}") || declared.contains("\"in\":\"path\""), "{path}");
            }
        }
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert_eq!(value["paths"]["/sample"]["get"]["parameters"][5]["required"], true);
    }
}

"""The clients that people have, unchanged, against two nodes. make test-clients installs them."""
import pytest


def test_huggingface_hub(two_nodes):
    hub = pytest.importorskip("huggingface_hub")
    client = hub.InferenceClient(base_url=two_nodes.url, api_key="none", timeout=60)
    text = client.text_generation("The capital of France is", max_new_tokens=5, do_sample=False)
    assert text == two_nodes.complete("The capital of France is", max_tokens=5).text
    pieces = list(client.text_generation("The capital of France is", max_new_tokens=5, do_sample=False,
                                         stream=True))
    assert "".join(pieces) == text
    chat = client.chat_completion([{"role": "user", "content": "Hello"}], model="demo", max_tokens=5)
    assert chat.choices[0].message.content


def test_tritonclient(two_nodes):
    numpy = pytest.importorskip("numpy")
    http = pytest.importorskip("tritonclient.http")
    client = http.InferenceServerClient(f"127.0.0.1:{two_nodes.port}")
    metadata = client.get_model_metadata("demo")
    assert metadata["inputs"][0]["datatype"] == "UINT32"
    tensor = http.InferInput("input0", [1, 3], "UINT32")
    tensor.set_data_from_numpy(numpy.array([[1, 2, 3]], dtype=numpy.uint32), binary_data=False)
    result = client.infer("demo", [tensor], outputs=[http.InferRequestedOutput("output0", binary_data=False)])
    assert result.as_numpy("output0").shape[0] == 1


def test_litellm(two_nodes):
    litellm = pytest.importorskip("litellm")
    options = {"model": "openai/demo", "api_base": f"{two_nodes.url}/v1", "api_key": "none",
               "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
    answer = litellm.completion(**options)
    pieces = [c.choices[0].delta.content or "" for c in litellm.completion(stream=True, **options)]
    assert "".join(pieces) == answer.choices[0].message.content


def test_langchain(two_nodes):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model="demo", base_url=f"{two_nodes.url}/v1", api_key="none",
                                 max_tokens=60, temperature=0)
    assert model.invoke("Hello").content
    assert "".join(piece.content for piece in model.stream("Hello"))

    def get_weather(city: str) -> str:
        """Current weather of a city."""
        return city
    forced = model.bind_tools([get_weather], tool_choice="get_weather", parallel_tool_calls=False)
    assert forced.invoke("Weather in Rome?").tool_calls[0]["name"] == "get_weather"
    structured = model.with_structured_output({"title": "answer", "type": "object",
                                               "properties": {"yes": {"type": "boolean"}},
                                               "required": ["yes"], "additionalProperties": False},
                                              method="json_schema")
    assert isinstance(structured.invoke("Is water wet?")["yes"], bool)

"""The tour of the metadata store in metadata/README.md works, command by command."""

from localcluster import free_ports
from tour import BEGIN, END, PAGE, PARTS, Tour, markdown


def test_every_command_of_the_tour_does_what_the_page_says(tmp_path):
    tour = Tour(tmp_path, free_ports(14))
    try:
        text = markdown(tour)
    finally:
        tour.close()
    assert text.count("```console") == len(PARTS)


def test_the_page_has_the_commands_of_the_tour():
    page = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    for part in PARTS:
        assert f"### {part.title}\n" in page
        for step in part.steps:
            assert f"$ {step.command.replace('{port}', '7400')}" in page

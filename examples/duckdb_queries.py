"""Query a run with SQL: counts by status, classes by mask area, rows whose box is small.

python duckdb_queries.py RUN        (pip install duckdb)
"""

import sys

import duckdb

QUERIES = {
    "rows by status": "SELECT status, count(*) AS rows FROM run GROUP BY 1 ORDER BY 2 DESC",
    "classes with the largest masks": """
        SELECT predicted, count(*) AS images, round(avg(mask_area), 3) AS area, round(avg(score), 3) AS score
        FROM run WHERE status = 'ok' GROUP BY 1 ORDER BY area DESC LIMIT 5
    """,
    "boxes that cover less than a quarter of the image": """
        SELECT key, boxes[1] AS box, image_width, image_height
        FROM run
        WHERE status = 'ok' AND len(boxes) > 0
          AND (boxes[1][3] - boxes[1][1]) * (boxes[1][4] - boxes[1][2]) < 0.25 * image_width * image_height
        ORDER BY key LIMIT 5
    """,
}


def main(path: str) -> dict[str, list[tuple]]:
    """Print and return the rows of each query."""
    # Only these columns are read from the files; maps and masks stay on the disk.
    run = duckdb.read_parquet(f"{path}/data/**/*.parquet")  # noqa: F841  (the queries name it)
    answers = {}
    for title, query in QUERIES.items():
        answer = duckdb.sql(query)
        print(f"\n{title}\n{answer}")
        answers[title] = answer.fetchall()
    return answers


if __name__ == "__main__":
    main(sys.argv[1])
